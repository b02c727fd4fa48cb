"""How vLLM is to run is decided without vLLM."""

import json
from functools import partial

import pytest

from rbee import gpus
from rbee.errors import BadInputError, MachineError
from rbee.gpus import Gpu
from rbee.machine import Machine, threads
from rbee.model import WorkerId, WorkerSpec
from rbee.models.footprint import MIB
from rbee.testing.tiny_model import write_tiny_model
from rbee.worker import vllm_plan
from rbee.worker.vllm_plan import arguments, check_backend, check_options

OLD = Machine(frozenset({"avx2"}), 4, "x86_64")
NEW = Machine(frozenset({"avx2", "avx512_bf16"}), 1, "x86_64")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def spec(model_dir="", **given):
    return WorkerSpec(WorkerId("w"), "tiny", str(model_dir), **given)


def value(argv, flag):
    (found,) = [word for word in argv if word.startswith(f"{flag}=")]
    return found.partition("=")[2]


def test_a_cpu_without_bfloat16_computes_in_float32(tiny_model):
    assert value(arguments(spec(tiny_model), OLD), "--dtype") == "float32"
    assert value(arguments(spec(tiny_model), NEW), "--dtype") == "auto"
    assert value(arguments(spec(tiny_model, dtype="bfloat16"), OLD), "--dtype") == "bfloat16"


def test_cpu_defaults_are_small_and_start_fast(tiny_model):
    argv = arguments(spec(tiny_model, served_names=("a", "b")), OLD)
    assert value(argv, "--kv-cache-memory-bytes") == str(256 * MIB)
    assert value(argv, "--max-model-len") == "2048"
    assert "--enforce-eager" in argv
    assert argv[2:6] == ["--served-model-name", "tiny", "a", "b"]


def test_one_core_stays_free():
    assert threads(OLD) == 3
    assert threads(NEW) == 1


def test_what_is_asked_for_reaches_vllm(tiny_model):
    given = {"max_model_len": 1024, "max_num_seqs": 4, "kv_cache_bytes": 10 * MIB, "dtype": "half"}
    argv = arguments(spec(tiny_model, **given), OLD)
    assert value(argv, "--max-model-len") == "1024"
    assert value(argv, "--max-num-seqs") == "4"
    assert value(argv, "--kv-cache-memory-bytes") == str(10 * MIB)
    assert value(argv, "--dtype") == "float16"


def test_a_share_of_the_memory_replaces_the_size_of_the_cache(tiny_model):
    argv = arguments(spec(tiny_model, engine_args={"gpu_memory_utilization": "0.2"}), OLD)
    assert value(argv, "--gpu-memory-utilization") == "0.2"
    assert not [word for word in argv if word.startswith("--kv-cache-memory-bytes")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "float8"}, "needed: auto, half"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1, got 0"),
        ({"kv_cache_bytes": -5}, "--kv-cache must be at least 1, got -5"),
        ({"engine_args": {"model": "x"}}, "--model"),
        ({"engine_args": {"max_model_len": "5"}}, "--max-model-len"),
    ],
)
def test_what_no_model_could_be_started_with_is_refused_without_one(given, said):
    with pytest.raises(BadInputError, match=said):
        check_options(spec(**given))


def on_gpus(monkeypatch, *cards):
    monkeypatch.setattr(vllm_plan, "chosen_gpus", lambda device: list(cards))


def test_two_workers_share_a_gpu_because_each_takes_a_set_size(tiny_model, monkeypatch):
    gib = 1 << 30
    on_gpus(monkeypatch, Gpu(0, "card", 80 * gib, 30 * gib))
    argv = arguments(spec(tiny_model, backend="cuda"), OLD)
    assert int(value(argv, "--kv-cache-memory-bytes")) < gib
    assert float(value(argv, "--gpu-memory-utilization")) == 0.01
    assert value(argv, "--max-model-len") == "auto"
    asked = arguments(spec(tiny_model, backend="cuda", kv_cache_bytes=20 * gib), OLD)
    assert value(asked, "--kv-cache-memory-bytes") == str(20 * gib)
    assert float(value(asked, "--gpu-memory-utilization")) == 0.25


def test_an_asked_share_of_a_gpu_is_left_to_vllm(tiny_model, monkeypatch):
    on_gpus(monkeypatch, Gpu(0, "card", 80 << 30, 80 << 30))
    given = {"backend": "cuda", "engine_args": {"gpu-memory-utilization": "0.5"}}
    argv = arguments(spec(tiny_model, **given), OLD)
    assert value(argv, "--gpu-memory-utilization") == "0.5"
    assert not [word for word in argv if word.startswith("--kv-cache-memory-bytes")]


def captured(tiny_model, **engine_args):
    argv = arguments(spec(tiny_model, backend="cuda", engine_args=engine_args), OLD)
    return [w.partition("=")[2] for w in argv if w.startswith("--cudagraph-capture-sizes=")]


def test_few_cuda_graphs_are_captured_unless_the_user_says_which(tiny_model, monkeypatch):
    on_gpus(monkeypatch, Gpu(0, "card", 80 << 30, 80 << 30))
    (sizes,) = captured(tiny_model)
    assert json.loads(sizes)[:4] == [1, 2, 4, 8]
    assert json.loads(sizes)[-1] == 512
    assert captured(tiny_model, **{"cudagraph-capture-sizes": "[1, 3]"}) == ["[1, 3]"]
    assert captured(tiny_model, max_cudagraph_capture_size="8") == []
    assert captured(tiny_model, **{"speculative-config.num_speculative_tokens": "3"}) == []
    assert captured(tiny_model, **{"compilation-config.mode": "3"}) == []


def test_what_was_compiled_is_loaded_whole_unless_the_user_says_how(monkeypatch):
    monkeypatch.setattr(vllm_plan, "visible_gpus", lambda: ["0"])
    environment = partial(vllm_plan.environment, spec(backend="cuda"), "/tmp/run")
    for name in vllm_plan.COMPILING:
        monkeypatch.delenv(name, raising=False)
    assert environment()[vllm_plan.WHOLE_ARTIFACT] == "1"
    monkeypatch.setenv("VLLM_USE_STANDALONE_COMPILE", "0")
    assert vllm_plan.WHOLE_ARTIFACT not in environment()
    assert vllm_plan.WHOLE_ARTIFACT not in vllm_plan.environment(spec(), "/tmp/run")


def test_all_workers_share_the_kernels_that_triton_has_compiled(monkeypatch):
    monkeypatch.setattr(vllm_plan, "visible_gpus", lambda: ["0"])
    environment = partial(vllm_plan.environment, spec(backend="cuda"), "/tmp/run")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert environment()["TRITON_CACHE_DIR"] == "/home/me/.triton/cache"
    monkeypatch.setenv("TRITON_HOME", "/data")
    assert environment()["TRITON_CACHE_DIR"] == "/data/.triton/cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/kernels")
    assert environment()["TRITON_CACHE_DIR"] == "/kernels"
    assert "TRITON_CACHE_DIR" not in vllm_plan.environment(spec(), "/tmp/run")


@pytest.mark.parametrize(("sequences", "sizes"), [(1, [1, 2]), (5, [1, 2, 4, 8, 10])])
def test_no_graph_is_larger_than_the_batches_will_be(sequences, sizes):
    assert vllm_plan.graphs(sequences) == sizes


def test_engine_arguments_are_passed_on_and_win(tiny_model):
    given = {"enforce_eager": "false", "block-size": "32", "enable-prefix-caching": "true"}
    argv = arguments(spec(tiny_model, engine_args=given), OLD)
    assert "--no-enforce-eager" in argv
    assert "--enforce-eager" not in argv
    assert value(argv, "--block-size") == "32"
    assert "--enable-prefix-caching" in argv


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"config\.json"):
        arguments(spec(tmp_path), OLD)


def installed(monkeypatch, *, cpu, count):
    monkeypatch.setattr(vllm_plan.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_plan, "_is_cpu_build", lambda: cpu)
    monkeypatch.setattr(gpus, "gpu_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("cpu", "count", "given", "error", "said"),
    [
        (True, 1, {"backend": "cuda"}, MachineError, "built for cpu"),
        (False, 0, {"backend": "cuda"}, MachineError, "no usable NVIDIA GPU"),
        (False, 2, {"backend": "cuda", "device": "0,2"}, BadInputError, "device 2"),
        (False, 2, {"backend": "cuda", "device": "1,1"}, BadInputError, "twice"),
        (False, 2, {"backend": "cuda", "device": "x"}, BadInputError, "indices"),
        (True, 0, {"device": "1"}, BadInputError, "device 1"),
        (True, 0, {"backend": "metal"}, BadInputError, "metal"),
        (True, 0, {"task": "paint"}, BadInputError, "paint"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_never_another_one(
    monkeypatch, cpu, count, given, error, said
):
    installed(monkeypatch, cpu=cpu, count=count)
    with pytest.raises(error, match=said):
        check_backend(spec(**given))


@pytest.mark.parametrize(("cpu", "backend"), [(True, "cpu"), (False, "cuda")])
def test_who_names_no_backend_gets_that_of_the_installed_vllm(monkeypatch, cpu, backend):
    installed(monkeypatch, cpu=cpu, count=0)
    assert vllm_plan.own_backend("vllm") == backend
    assert vllm_plan.own_backend("echo") == "cpu"


def test_chosen_gpus_are_the_only_visible_ones(monkeypatch):
    installed(monkeypatch, cpu=False, count=4)
    chosen = spec(backend="cuda", device="1,3")
    check_backend(chosen)
    variables = vllm_plan.environment(chosen, "/run")
    assert variables["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_missing_vllm_is_told_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(vllm_plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError) as info:
        check_backend(spec())
    assert "[cpu]" in info.value.hint
