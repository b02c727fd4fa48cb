"""``infer``: one prompt, one answer, and nothing left behind."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from rbee.client import KEEP_A_QUEEN, OPERATOR, AsyncClient
from rbee.errors import RbeeError
from rbee.home import open_home
from rbee.keeper.answer import Answer, stream_answer
from rbee.keeper.flags import InferFlags
from rbee.keeper.output import note, open_output, print_json
from rbee.keeper.queen import open_queen
from rbee.keeper.sources import load_settings
from rbee.keeper.task import check_known
from rbee.wire.messages import TaskRequest


async def infer(flags: InferFlags, task: TaskRequest) -> None:
    """Answer ``task`` on stdout, with a queen of our own if none runs."""
    home = open_home(flags.home)
    config, answer = load_settings(home), Answer()
    async with (
        open_output(quiet_data=flags.json) as output,
        open_queen(
            home,
            config,
            url=flags.queen_url or "",
            token_file=flags.token_file or "",
            check=partial(check_known, flags, flags.model, config),
        ) as queen,
    ):
        if queen.owned:
            await output.tell(f"keeper: start {_told(queen.url, config.queen.port)}")
        await stream_answer(queen.client, task, output, answer)
        if flags.json:
            print_json(answer.facts())
        ending = await _ending(queen.client) if queen.owned else ""
    if ending:
        note(f"note: {ending} ended with this command; to keep them:\n  {KEEP_A_QUEEN}")


async def _ending(client: AsyncClient) -> str:
    """Name what ends with our own queen; an operator's hive stays."""
    with suppress(RbeeError):  # the answer is here: a queen that cannot tell is no failure
        if any(hive.owner == OPERATOR for hive in await client.hives()):
            return "queen and worker"
    return "queen, hive and worker"


def _told(url: str, port: int) -> str:
    taken = "" if port == 0 or url.endswith(f":{port}") else f"; port {port} is taken"
    return f"a queen at {url} (none was running{taken})"
