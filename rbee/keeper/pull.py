"""``model pull``: on this machine's disk, or through a queen on a node's."""

from __future__ import annotations

from rbee.home import open_home
from rbee.keeper.flags import PullFlags
from rbee.keeper.models import open_queen_for
from rbee.keeper.output import ProgressNotes, print_data, print_json
from rbee.models.reference import absolute
from rbee.wire import codec
from rbee.wire.messages import Narration, Pulled, PullModel


async def pull_model(flags: PullFlags, name: str) -> None:
    """Print the model's directory once it is there, whole."""
    notes = ProgressNotes()
    try:
        pulled = await _pull(flags, PullModel(absolute(name), flags.node, flags.dtype), notes)
    finally:
        notes.clear()
    if flags.json:
        print_json(codec.to_dict(pulled))
    else:
        print_data(pulled.directory)


async def _pull(flags: PullFlags, request: PullModel, notes: ProgressNotes) -> Pulled:
    def narrate(action: str, text: str, *, share: float | None = None) -> None:
        notes(f"model: {action} {text}", share)

    async def tell(event: Narration) -> None:
        notes(f"{event.actor}: {event.action} {event.text}", event.share)

    home = open_home(flags.home)
    if flags.node is not None or flags.queen_url:
        async with open_queen_for(flags, home) as queen:
            if queen is not None:
                return await queen.client.pull(request, tell)
    from rbee.hive.catalog import pull_here

    return await pull_here(home, request, narrate)
