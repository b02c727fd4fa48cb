"""``infer``: one prompt, one answer, and nothing left behind."""

from __future__ import annotations

from rbee.client import KEEP_A_QUEEN
from rbee.config import load_config
from rbee.home import open_home
from rbee.keeper.answer import Answer, stream_answer
from rbee.keeper.flags import InferFlags
from rbee.keeper.output import Output, note, print_json
from rbee.keeper.queen import open_queen
from rbee.wire.messages import TaskRequest


async def infer(flags: InferFlags, task: TaskRequest) -> None:
    """Answer ``task`` on stdout, with a queen of our own if none runs."""
    home = open_home(flags.home)
    output, answer = Output(quiet_data=flags.json), Answer()
    config = load_config(home.config_file)
    async with open_queen(
        home,
        config,
        url=flags.queen_url or "",
        token_file=flags.token_file or "",
    ) as queen:
        if queen.owned:
            await output.narrate("keeper", "start", _told(queen.url, config.queen.port))
        await stream_answer(queen.client, task, output, answer)
        if flags.json:
            print_json(answer.facts())
    if queen.owned:
        note(f"note: queen, hive and worker ended with this command; to keep them:\n"
             f"  {KEEP_A_QUEEN}")  # fmt: skip


def _told(url: str, port: int) -> str:
    taken = "" if port == 0 or url.endswith(f":{port}") else f"; port {port} is taken"
    return f"a queen at {url} (none was running{taken})"
