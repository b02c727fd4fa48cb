"""``model pull``: on this machine's disk, or on a node's: through a queen, or sent from here."""

from __future__ import annotations

from functools import partial

from rbee.home import open_home
from rbee.keeper.flags import PullFlags
from rbee.keeper.models import open_queen_for
from rbee.keeper.output import Output, open_output, print_data, print_json
from rbee.keeper.start import is_ours
from rbee.models.access import read_access
from rbee.models.footprint import check_dtype
from rbee.models.reference import absolute
from rbee.wire import codec
from rbee.wire.messages import Narration, Pulled, PullModel


async def pull_model(flags: PullFlags, name: str) -> None:
    """Print the model's directory once it is there, whole."""
    hub = read_access(is_ours=is_ours(flags))
    request = PullModel(absolute(name), flags.node, _dtype(flags), hub=hub)
    async with open_output() as output:
        pulled = await _pull(flags, request, output)
    if flags.json:
        print_json(codec.to_dict(pulled))
    else:
        print_data(pulled.directory)


def _dtype(flags: PullFlags) -> str | None:
    dtype = check_dtype(flags.dtype)
    return None if dtype == "auto" else dtype


async def _pull(flags: PullFlags, request: PullModel, output: Output) -> Pulled:
    if flags.copy:
        from rbee.keeper.copy import check_copy, copy_model

        check_copy(flags, request.model)
        return await copy_model(flags, request, output)
    home = open_home(flags.home)
    if flags.node is not None or flags.queen_url:
        async with open_queen_for(flags, home) as queen:
            if queen is not None:

                async def tell(event: Narration) -> None:
                    await output.narrate(event.actor, event.action, event.text, event.share)

                return await queen.client.pull(request, tell)
    from rbee.hive.catalog import pull_here

    return await pull_here(home, request, partial(output.step, "model"))
