"""Is there room for a worker? Three questions without side effects, for the hive to ask in turn.

`plan_memory` tells what it would take, `free_memory` what there is, `check_room` whether that is
enough; between the last two a hive may unload a worker and look again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rbee.errors import InsufficientError
from rbee.gpus import chosen_gpus
from rbee.hints import infer
from rbee.machine import cgroup_memory, node_memory, this_machine
from rbee.models.footprint import MIB, Asked, MemoryPlan, footprint
from rbee.models.preflight import available_memory
from rbee.models.reference import shown
from rbee.units import human


class Local(Protocol):
    """A model on this machine."""

    @property
    def directory(self) -> Path: ...


def plan_memory(model: Local, asked: Asked) -> MemoryPlan:
    """Return what a worker with this model would need on each of its devices.

    Raises:
        BadInputError: the directory is broken, or what is asked does not fit the model.
    """
    return footprint(model.directory, asked, this_machine()).plan


def free_memory(backend: str | None, device: str | None) -> int | None:
    """Return the bytes that a new worker can have: of several GPUs, those of the fullest one.

    For a CPU that is what the kernel can give without swapping, on the NUMA node that vLLM stays
    on and within the container's limit. None where the machine does not tell.
    """
    if (backend or "cpu") == "cpu":
        limits = [memory.available for memory in (node_memory(), cgroup_memory()) if memory]
        available = available_memory()
        return min(limits if available is None else [available, *limits], default=None)
    return min((gpu.free for gpu in chosen_gpus(device or "0")), default=None)


def check_room(plan: MemoryPlan, available: int | None, *, model: str, bound: str = "") -> None:
    """Raise `InsufficientError` unless the plan fits; what nobody knows refuses nothing.

    ``bound``: what sets the limit, if it is not the machine.
    """
    if available is None or plan.required <= available:
        return
    biggest = plan.biggest_context(available)
    each = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
    fits = f"the biggest context that would fit is {biggest} tokens"
    raise InsufficientError(
        f"not enough memory for {shown(model)}{bound}: needed {human(plan.required)}{each} "
        f"(weights {human(plan.weights)}, KV cache {human(plan.kv)}, "
        f"engine {human(plan.overhead)}), available "
        f"{human(available)}; {fits if biggest else 'no context is short enough'}",
        code="insufficient_memory",
        hint=_way_out(plan, available, biggest, model),
        required=plan.required,
        available=available,
        weights=plan.weights,
        kv=plan.kv,
        overhead=plan.overhead,
        biggest_context=biggest,
    )


def _way_out(plan: MemoryPlan, available: int, biggest: int, model: str) -> str:
    """Return one command after which it fits, or which frees memory."""
    room = plan.room(available)
    shorter = ("--max-model-len", biggest) if 0 < biggest < plan.context else ()
    if shorter and room >= plan.kv_floor:
        return infer(*shorter, model=model)
    if biggest and room >= MIB:
        whole = plan.shape.size(biggest)
        size = room // 2 if room // 2 >= max(whole, MIB) else room  # leave some for the next one
        return infer(*shorter, "--kv-cache", f"{size // MIB}M", model=model)
    return "rbee-keeper worker list   # then rbee-keeper worker stop ID frees what it holds"
