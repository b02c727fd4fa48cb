"""How a worker is to be started, and the bytes that it takes then.

Worked out from ``config.json`` and the heads of the weights, without vLLM. The worker gets its
arguments from the same numbers (`rbee.worker.vllm_plan`), so what is checked is what is taken.

On CUDA a worker takes a KV cache of a set size, not vLLM's 92 % of the card, so that several live
side by side: one request of full length at least, `CUDA_REQUESTS` of them where they take no more
than half of what is free.
``--engine-arg gpu-memory-utilization=F`` takes that share of the device instead, as in vLLM.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs

from rbee.errors import BadInputError
from rbee.gpus import chosen_gpus, device_indices
from rbee.hints import infer
from rbee.machine import Machine, cpu_dtype, node_memory, this_machine
from rbee.models.inspect import Inspection, inspect_model
from rbee.models.kv_cache import KV_BLOCK, CacheShape, cache_shape, read_config
from rbee.models.preflight import ITEM_SIZES, OVERHEAD, meminfo
from rbee.units import human
from rbee.worker.engine_args import engine_options

MIB = 1 << 20
CPU_CONTEXT = 2048  # tokens, unless asked: the KV cache is ordinary memory, zeroed at the start
CPU_KV_CACHE = 256 * MIB
CPU_SEQS = 16
CUDA_CONTEXT = 8192  # tokens that must fit, unless asked; vLLM takes more where its cache has room
CUDA_REQUESTS = 8  # of that length, in a KV cache of which nobody said the size
CUDA_SEQS = 256
# the CUDA context, kernels and graphs, and the activations of the largest batch
CUDA_OVERHEAD = 3072 * MIB

DTYPES = {
    "auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16",
    "float": "float32", "float32": "float32",
}  # fmt: skip
CAST = (*ITEM_SIZES, "float64")  # weights that come in one of these are cast to the target dtype
FRACTIONS = ("gpu-memory-utilization", "device-memory-utilization")


class Asked(Protocol):
    """What a start asks for (`StartWorker`, `WorkerSpec`)."""

    @property
    def backend(self) -> str | None: ...
    @property
    def device(self) -> str | None: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def dtype(self) -> str | None: ...
    @property
    def kv_cache_bytes(self) -> int | None: ...
    @property
    def max_num_seqs(self) -> int | None: ...
    @property
    def engine_args(self) -> Mapping[str, str]: ...


@attrs.frozen
class MemoryPlan:
    """The bytes that a worker needs on each of its devices, and what they were counted for.

    Attributes:
        kv: of the KV cache; a worker on CUDA takes up to ``kv_wish`` where there is room.
        context, sequences: how many requests of full length ``kv`` is for.
        limit: longest context of the model; 0 where it does not say.
        kv_floor: what the cache has however short the context.
    """

    weights: int
    kv: int
    overhead: int
    kv_wish: int = 0
    context: int = 0
    sequences: int = 1
    limit: int = 0
    kv_floor: int = 0
    devices: int = 1
    shape: CacheShape = attrs.field(factory=CacheShape)

    @property
    def required(self) -> int:
        return self.weights + self.kv + self.overhead

    def room(self, available: int) -> int:
        """Return what is left for the KV cache."""
        return available - self.weights - self.overhead

    def pool(self, available: int) -> int:
        """Return how large the worker makes its KV cache: beyond its need, half of what is free."""
        return max(self.kv, min(self.kv_wish, self.room(available) // 2))

    def biggest_context(self, available: int) -> int:
        """Return the longest context that would fit, up to the model's own; 0 if none does."""
        room, most = self.room(available), self.limit or self.context
        if not self.shape:
            return most if room >= self.kv else 0
        fits = bisect_right(range(most + 1), room, key=self._size)
        return fits - 1 if fits > 2 else 0

    def _size(self, context: int) -> int:
        return self.shape.size(context, self.sequences)


@attrs.frozen
class Footprint:
    """How a worker is to be started, and the memory that it takes then.

    Attributes:
        context: None leaves it to vLLM: the longest that its KV cache has room for.
        sequences: requests that it works on at once.
        fraction: of each device's whole memory, where the user said so in vLLM's own way.
    """

    context: int | None
    dtype: str
    sequences: int
    fraction: float | None
    plan: MemoryPlan


def footprint(directory: Path, asked: Asked, machine: Machine) -> Footprint:
    """Settle what a start leaves open, and count the memory.

    Raises:
        BadInputError: the directory is broken, or what is asked does not fit the model.
    """
    check_asked(asked)
    found = inspect_model(directory)
    options = engine_options(asked.engine_args)
    is_cpu = (asked.backend or "cpu") == "cpu"
    dtype = check_dtype(asked.dtype) or (cpu_dtype(machine) if is_cpu else "auto")
    is_open = asked.max_model_len is None and not is_cpu
    return Footprint(
        context=None if is_open else _context(found, asked, is_cpu),
        dtype=dtype,
        sequences=asked.max_num_seqs or (CPU_SEQS if is_cpu else CUDA_SEQS),
        fraction=None if asked.kv_cache_bytes else _fraction(options),
        plan=_plan(found, asked, dtype, options, is_cpu),
    )


def _plan(
    found: Inspection, asked: Asked, dtype: str, options: Mapping[str, str], is_cpu: bool
) -> MemoryPlan:
    config = read_config(found.directory)
    devices = 1 if is_cpu else len(device_indices(asked.device or "0"))
    item = 1 if options.get("kv-cache-dtype", "").startswith(("fp8", "int8")) else _item(dtype)
    shape = cache_shape(config, item, devices=devices, block=_block(options))
    context = _context(found, asked, is_cpu)
    plan = MemoryPlan(
        weights=-(-_weights(found, config, dtype) // devices),
        kv=shape.size(context, asked.max_num_seqs or 1),
        overhead=OVERHEAD if is_cpu else CUDA_OVERHEAD,
        context=context,
        sequences=asked.max_num_seqs or 1,
        limit=found.context,
        devices=devices,
        shape=shape,
    )
    return _with_cache(plan, found, asked, options, is_cpu)


def _with_cache(
    plan: MemoryPlan, found: Inspection, asked: Asked, options: Mapping[str, str], is_cpu: bool
) -> MemoryPlan:
    """Decide the size of the KV cache: asked for in bytes, as a share, by requests, or not."""
    least = plan.shape.size(plan.context)
    if asked.kv_cache_bytes:
        if asked.kv_cache_bytes < least and (is_cpu or asked.max_model_len):
            raise _too_small(found, asked.kv_cache_bytes, plan.context, least)
        return attrs.evolve(plan, kv=asked.kv_cache_bytes, kv_floor=asked.kv_cache_bytes)
    fraction, total = _fraction(options), _total_memory(asked)
    if fraction and total:
        kv = plan.room(int(fraction * total))
        if kv < least:
            raise _share_too_small(found, fraction, total, plan.weights + plan.overhead + least)
        return attrs.evolve(plan, kv=kv, kv_floor=kv)
    if asked.max_num_seqs:
        return plan
    if is_cpu:
        return attrs.evolve(plan, kv=max(CPU_KV_CACHE, plan.kv), kv_floor=CPU_KV_CACHE)
    whole = 0 if asked.max_model_len else plan.limit
    wish = max(plan.shape.size(plan.context, CUDA_REQUESTS), plan.shape.size(whole))
    return attrs.evolve(plan, kv_wish=wish)


def _context(found: Inspection, asked: Asked, is_cpu: bool) -> int:
    """Return the context to count: asked, or what the model can, capped."""
    default = CPU_CONTEXT if is_cpu else CUDA_CONTEXT
    if asked.max_model_len is None:
        return min(found.context or default, default)
    if asked.max_model_len < 2:
        raise BadInputError(
            f"--max-model-len must be at least 2: {asked.max_model_len}",
            hint=_fitting(found, "--max-model-len", found.context or default),
        )
    if found.context and asked.max_model_len > found.context:
        raise BadInputError(
            f"--max-model-len {asked.max_model_len} is more than the model's context of "
            f"{found.context}",
            hint=_fitting(found, "--max-model-len", found.context),
        )
    return asked.max_model_len


def check_asked(asked: Asked) -> None:
    """Refuse what no model could be started with."""
    check_dtype(asked.dtype)
    counts = {"max-num-seqs": asked.max_num_seqs, "kv-cache": asked.kv_cache_bytes}
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise BadInputError(
                f"--{flag} must be at least 1, got {count}",
                hint=f"{infer()}   # without --{flag}",
            )


def check_dtype(dtype: str | None) -> str | None:
    """Refuse a dtype that vLLM does not know; return its plain name."""
    if dtype is None:
        return None
    if dtype.lower() not in DTYPES:
        raise BadInputError(
            f"{dtype!r} is not a dtype (needed: {', '.join(DTYPES)})",
            code="bad_dtype",
            hint=infer("--dtype", "float32"),
        )
    return DTYPES[dtype.lower()]


def stored_dtype(backend: str | None, dtype: str | None) -> str:
    """Return what a GGUF is dequantised to, so that a worker can use it as it is."""
    named = check_dtype(dtype)
    if named in ITEM_SIZES:
        return str(named)
    is_cpu = (backend or "cpu") == "cpu"
    return "float32" if is_cpu and _own_dtype() == "float32" else "bfloat16"


@functools.cache
def _own_dtype() -> str:
    return cpu_dtype(this_machine())


# counting ---------------------------------------------------------------------------------------
def _weights(found: Inspection, config: Mapping[str, Any], dtype: str) -> int:
    """Count the weights in the target dtype; quantised ones stay as they are on disk."""
    is_cast = found.dtype in CAST and "quantization_config" not in config
    return found.parameters * _item(dtype) if is_cast else found.weight_bytes


def _item(dtype: str) -> int:
    return ITEM_SIZES.get(dtype, 2)  # `auto` has two bytes: vLLM casts float32 to bfloat16


def _block(options: Mapping[str, str]) -> int:
    given = options.get("block-size", "")
    is_number = given.isdecimal() and len(given) < 10
    return max(KV_BLOCK, int(given)) if is_number else KV_BLOCK


def _fraction(options: Mapping[str, str]) -> float | None:
    """Read the share of the device; vLLM's parser tells what is wrong with a bad one."""
    try:
        values = [float(options[name]) for name in FRACTIONS if name in options]
    except ValueError:
        return None
    return next((value for value in values if 0 < value <= 1), None)


def _total_memory(asked: Asked) -> int | None:
    if (asked.backend or "cpu") == "cpu":
        node = node_memory()
        return node.total if node else meminfo("MemTotal")
    return min((gpu.total for gpu in chosen_gpus(asked.device or "0")), default=None)


def _too_small(found: Inspection, given: int, context: int, least: int) -> BadInputError:
    return BadInputError(
        f"a KV cache of {human(given)} is too small: one request of {context} tokens needs "
        f"{human(least)}",
        hint=f"{_fitting(found, '--kv-cache', least)}   # or a smaller --max-model-len",
    )


def _share_too_small(found: Inspection, fraction: float, total: int, least: int) -> BadInputError:
    needed = min(math.ceil(100 * least / total) / 100, 1.0)
    return BadInputError(
        f"--engine-arg gpu-memory-utilization={fraction:g} of {human(total)} is too small: "
        f"weights, one request and the engine need {human(least)}",
        hint=_fitting(found, "--engine-arg", f"gpu-memory-utilization={needed:g}"),
    )


def _fitting(found: Inspection, *flags: object) -> str:
    return infer(*flags, model=str(found.directory))
