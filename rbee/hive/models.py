"""Bring the model of a request onto this machine, and see whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from rbee.config import load_config
from rbee.hive.room import Memory
from rbee.hive.workers import HiveSetup, Local, Provision
from rbee.models import memory
from rbee.models.child import Narrate
from rbee.models.footprint import MemoryPlan, stored_dtype
from rbee.models.provision import provision
from rbee.models.reference import Meaning
from rbee.process import run_program
from rbee.wire.messages import StartWorker
from rbee.worker.engine import engine_kind


def provisioner(setup: HiveSetup) -> Provision:
    """Make the function that fetches, converts and checks models for one hive."""

    async def bring(request: StartWorker, narrate: Narrate) -> Local | None:
        kind = engine_kind(request.engine)
        if not kind.needs_model:
            return None
        return await provision(
            request.model,
            setup.home,
            aliases=load_config(setup.home.config_file).aliases,
            meaning=Meaning(request.alias, request.sources),
            access=request.hub,
            dtype=stored_dtype(request.backend, request.dtype),
            run=_run,
            narrate=narrate,
        )

    return bring


def memory_of(setup: HiveSetup) -> Memory:
    """Say how a hive counts the memory of its machine."""
    looking = trio.CapacityLimiter(2)

    # In threads: a disk that hangs, or a driver that takes its time, must not freeze the hive.
    async def plan(local: memory.Local, request: StartWorker) -> MemoryPlan:
        return await trio.to_thread.run_sync(memory.plan_memory, local, request, limiter=looking)

    async def free(backend: str, device: str) -> int | None:
        return await trio.to_thread.run_sync(memory.free_memory, backend, device, limiter=looking)

    return Memory(plan=plan, free=free, check=memory.check_room, budget=setup.memory)


async def _run(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> int:
    return await run_program(argv, log_file=log, env=env)
