"""A queen inside another program.

What a queen is made of takes longer to import than her hive takes to start: that begins first.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import trio

from rbee import daemon
from rbee.errors import ConflictError, OwnerGoneError, RbeeError
from rbee.home import write_atomic
from rbee.queen.findable import serve_findable
from rbee.queen.machine import FirstHive, QueenSetup, start_of
from rbee.scopes import open_service
from rbee.sweep import claim, retire
from rbee.web.listener import open_listener, url_of
from rbee.wire.messages import Hello


async def embed(
    setup: QueenSetup, say: Callable[[Hello], None], *, needs_hive: bool = False
) -> None:
    """Be a queen inside another program: one per home, findable, until cancelled.

    Args:
        say: called once, when the next request would succeed.
        needs_hive: whether a hive of this machine will be asked for at once, for a worker of the
            setup's engine.
    """
    with (
        daemon.locked(setup.home.queen_file, "queen"),
        _own_run_dir(setup) as token_file,
        open_listener(setup.host, setup.port, exact=setup.exact_port) as listener,
    ):
        async with _open_first(setup, url_of(listener), needs_hive) as first:
            serve = await _load_serve()
            serving = partial(
                serve, setup, stop=_refuse_stop, ending=_program_left, listener=listener,
                first=first,
            )  # fmt: skip
            await serve_findable(setup, serving, token_file, say)


async def _load_serve() -> Callable[..., Awaitable[None]]:
    # In a thread: a hive that is on its way hears our beats meanwhile, and we hear who cancels.
    module = await trio.to_thread.run_sync(importlib.import_module, "rbee.queen.daemon")
    serve: Callable[..., Awaitable[None]] = module.serve
    return serve


@asynccontextmanager
async def _open_first(
    setup: QueenSetup, url: str, is_needed: bool
) -> AsyncGenerator[FirstHive | None, None]:
    if not is_needed:
        yield None
        return
    first = FirstHive(setup, start_of(setup, url, engine=setup.engine))
    async with open_service(first.keep):
        yield first


def _program_left() -> RbeeError:
    return OwnerGoneError(
        f"the queen ended with the cluster of the program that owned it (pid {os.getpid()})",
        hint="rbee-keeper queen start",
    )


def _refuse_stop(why: str) -> None:
    raise ConflictError(
        f"the queen is part of a program (pid {os.getpid()}): it ends when that leaves its cluster",
        code="not_owned",
        hint=f"ps -p {os.getpid()}",
    )


@contextmanager
def _own_run_dir(setup: QueenSetup) -> Iterator[Path]:
    """Make our directory and the token in it; both go with us."""
    claim(setup.run_dir)
    try:
        token_file = setup.run_dir / "token"
        write_atomic(token_file, setup.token)
        yield token_file
    finally:
        retire(setup.run_dir)
