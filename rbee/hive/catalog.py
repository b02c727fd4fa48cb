"""The catalog of a hive's machine: told, filled and emptied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from rbee.config import load_config
from rbee.home import Home
from rbee.models.catalog import remove_model
from rbee.models.child import Narrate
from rbee.models.footprint import stored_dtype
from rbee.models.info import model_infos
from rbee.models.pull import pull
from rbee.models.reference import Meaning
from rbee.process import run_program
from rbee.web.narrated import Tell, narrated
from rbee.web.router import Stream
from rbee.wire.messages import ModelInfo, Narration, Pulled, PullModel


async def list_catalog(home: Home, node: str) -> list[ModelInfo]:
    find = partial(model_infos, home, node)
    return await trio.to_thread.run_sync(find, abandon_on_cancel=True)


async def pull_here(home: Home, request: PullModel, narrate: Narrate) -> Pulled:
    """Have a model on this machine's disk; cancelling leaves nothing half-written."""
    model = await pull(
        request.model,
        home,
        aliases=load_config(home.config_file).aliases,
        meaning=Meaning(request.alias, request.sources),
        access=request.hub,
        dtype=request.dtype,
        default=stored_dtype("cpu", None),
        run=_run,
        narrate=narrate,
    )
    return Pulled(model.reference, str(model.directory))


def stream_pull(home: Home, request: PullModel) -> Stream:
    """Pull a model for as long as somebody reads how it goes."""

    async def work(tell: Tell) -> Pulled:
        def narrate(action: str, text: str, *, share: float | None = None) -> None:
            tell(Narration("hive", action, text, share))

        return await pull_here(home, request, narrate)

    return narrated(work)


async def remove_here(home: Home, name: str) -> None:
    """Remove a model unless a worker uses it."""
    aliases = load_config(home.config_file).aliases
    await trio.to_thread.run_sync(partial(remove_model, home, name, aliases=aliases))


async def _run(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> int:
    return await run_program(argv, log_file=log, env=env)
