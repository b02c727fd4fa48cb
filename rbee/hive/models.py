"""Bring the model of a request onto this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from rbee.config import load_config
from rbee.hive.workers import HiveSetup, Local, Provision
from rbee.models.child import Narrate
from rbee.models.preflight import ITEM_SIZES
from rbee.models.provision import check_model_memory, provision
from rbee.process import run_program
from rbee.wire.messages import StartWorker
from rbee.worker.engine import engine_kind

KV_CACHE = 256 << 20  # bytes, where the request names no size


def provisioner(setup: HiveSetup) -> Provision:
    """Make the function that fetches, converts and checks models for one hive."""

    async def bring(request: StartWorker, narrate: Narrate) -> Local | None:
        kind = engine_kind(request.engine)
        if not kind.needs_model:
            return None
        model = await provision(
            request.model,
            setup.home,
            aliases=load_config(setup.home.config_file).aliases,
            dtype=_stored_dtype(request),
            run=_run,
            narrate=narrate,
        )
        if (request.backend or "cpu") == "cpu":
            check_model_memory(model, _stored_dtype(request), request.kv_cache_bytes or KV_CACHE)
        return model

    return bring


async def _run(argv: Sequence[str], *, log: Path) -> int:
    return await run_program(argv, log_file=log)


def _stored_dtype(request: StartWorker) -> str:
    """Return what a GGUF is dequantised to; ``auto`` and the like leave it to us."""
    if request.dtype in ITEM_SIZES:
        return str(request.dtype)
    return default_dtype(request.backend or "cpu")


@functools.cache
def default_dtype(backend: str) -> str:
    """Return the dtype to store dequantised weights in.

    A CPU without AVX512-BF16 or AMX has no fast bfloat16 kernels: float32 is 2.8 times cheaper.
    """
    if backend != "cpu":
        return "bfloat16"
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
