"""The queen: the orchestrator. Cancelling `serve` is the cascading shutdown."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from rbee import __version__, daemon
from rbee.errors import OwnerGoneError, RbeeError, UnavailableError
from rbee.home import write_atomic
from rbee.queen.aliases import Aliases
from rbee.queen.app import make_app
from rbee.queen.assignments import Assignments
from rbee.queen.attempts import Attempts
from rbee.queen.findable import serve_findable
from rbee.queen.hives import Hives
from rbee.queen.jobs import Jobs
from rbee.queen.machine import FirstHive, QueenSetup
from rbee.queen.machines import Machines
from rbee.queen.metrics import add_metrics
from rbee.queen.needs import counting
from rbee.queen.offer import Offer
from rbee.queen.openai import Passages
from rbee.queen.places import Places
from rbee.queen.starts import Starts
from rbee.queen.targets import add_target_routes
from rbee.queen.views import Views
from rbee.scopes import open_service
from rbee.sweep import claim, retire, sweep_abandoned
from rbee.web.front import Front
from rbee.web.listener import open_listener, url_of
from rbee.web.narrated import Works
from rbee.web.poller import open_poller
from rbee.web.pump import open_pump
from rbee.web.server import serve_http
from rbee.web.upstream import open_upstreams
from rbee.wire.messages import Hello

STALL_LIMIT = 30.0  # seconds for which a client may take nothing of his answer


def stopping() -> RbeeError:
    return UnavailableError("the queen is stopping", code="queen_stopping")


async def serve(
    setup: QueenSetup,
    *,
    stop: Callable[[str], None],
    ending: Callable[[], RbeeError] = stopping,
    allowed_origins: Sequence[str] = (),
    listener: socket.socket | None = None,
    first: FirstHive | None = None,
    task_status: trio.TaskStatus[Hello] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a queen until cancelled; ``task_status`` receives what it says to its owner.

    Args:
        listener: where it serves, if that is open already.
        first: the hive of this machine, if that is on its way already.
        allowed_origins: the web pages that may call it, as `checked_origin` returns them.

    Raises:
        ConflictError: its port is taken and must not be another one.
    """
    if listener is None:
        listener = open_listener(setup.host, setup.port, exact=setup.exact_port)
    await sweep_abandoned(setup.home.run, setup.run_dir)
    daemon.remove_stale(setup.home.hive_file, "hive")
    machines = Machines(setup, first)
    hives = Hives(setup, machines)
    hives.url = url_of(listener)
    aliases = Aliases(setup.home.config_file, setup.engine)
    attempts = Attempts(hives.get)
    views = Views(setup.home, hives, attempts, machines.store, machines.fenced_for)
    needed = counting(setup.home, aliases.meanings)
    places = Places(views.look, attempts, needed, aliases.meanings)
    assignments = Assignments(hives, places, aliases, setup.limits)
    starts, works = Starts(hives, places, assignments), Works(ending)
    # HTTP outlives the jobs: each open stream still gets its last event. SSH outlives hives.
    async with (
        open_poller() as poller,
        open_pump(poller, STALL_LIMIT) as pump,
        open_upstreams(poller) as upstreams,
    ):
        jobs = Jobs(assignments, aliases, upstreams, ending)
        passages = Passages(assignments, aliases, Offer(aliases, views.look), upstreams, ending)
        app = make_app(
            setup, hives, jobs, starts, works, passages, aliases, stop, allowed_origins,
            assignments.room.reading,
        )  # fmt: skip
        add_metrics(app, assignments, hives, jobs)
        add_target_routes(app, hives)
        serving = partial(serve_http, app, listener, grace=0.5, front=Front(app, pump))
        async with (
            open_service(serving) as url,
            machines.open(),
            hives.open(),
            attempts.open(),
            assignments.open(),
            jobs.open(),
            passages.open(),
            works.open(),
        ):
            task_status.started(Hello("queen", setup.id, __version__, os.getpid(), url))
            await trio.sleep_forever()


async def run(setup: QueenSetup, root: daemon.Root, *, allowed_origins: Sequence[str] = ()) -> None:
    """Be a queen daemon: one per home, findable, until the root is cancelled."""
    ending = partial(_ending, root)
    serving = partial(serve, setup, stop=root.stop, ending=ending, allowed_origins=allowed_origins)
    with daemon.locked(setup.home.queen_file, "queen"), _run_dir(setup, root) as token_file:
        await serve_findable(setup, serving, token_file, root.say_hello)


def _ending(root: daemon.Root) -> RbeeError:
    """Say why the streams of a queen that stops end."""
    if root.owned:
        return OwnerGoneError(
            "the queen ended with the rbee-keeper command that owned it",
            hint="rbee-keeper queen start",
        )
    return stopping()


@contextmanager
def _run_dir(setup: QueenSetup, root: daemon.Root) -> Iterator[Path]:
    """Yield the file that holds our token; an owned queen's lies in its own directory."""
    if root.owned:
        token_file = setup.run_dir / "token"
        write_atomic(token_file, setup.token)
        yield token_file
        return
    claim(setup.run_dir)
    try:
        yield setup.token_file or setup.home.token_file
    finally:
        retire(setup.run_dir)
