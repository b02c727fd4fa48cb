"""How vLLM is to run is decided without vLLM."""

import pytest

from rbee.errors import BadInputError, MachineError
from rbee.model import WorkerId, WorkerSpec
from rbee.testing.tiny_model import write_tiny_model
from rbee.worker import vllm_plan
from rbee.worker.vllm_plan import MIB, Machine, arguments, check_backend, kv_bytes, threads

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


def test_the_kv_cache_holds_at_least_one_request_of_full_length(tiny_model):
    config = {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "hidden_size": 576,
    }  # fmt: skip
    needed = kv_bytes(config, 8192, "float32")
    assert needed >= 2 * 30 * 3 * 64 * 4 * 8192
    assert kv_bytes(config, 8192, "bfloat16") == needed // 2
    with pytest.raises(BadInputError, match="too small"):
        arguments(spec(tiny_model, kv_cache_bytes=1000), OLD)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_model_len": 99999}, r"99999.*2048"),
        ({"max_model_len": 1}, "at least 2"),
        ({"engine_args": {"model": "x"}}, "--model"),
        ({"engine_args": {"max_model_len": "5"}}, "--max-model-len"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tiny_model, given, said):
    with pytest.raises(BadInputError, match=said):
        arguments(spec(tiny_model, **given), OLD)


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


def installed(monkeypatch, *, cpu, gpus):
    monkeypatch.setattr(vllm_plan.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_plan, "_is_cpu_build", lambda: cpu)
    monkeypatch.setattr(vllm_plan, "_gpu_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("cpu", "gpus", "given", "error", "said"),
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
    monkeypatch, cpu, gpus, given, error, said
):
    installed(monkeypatch, cpu=cpu, gpus=gpus)
    with pytest.raises(error, match=said):
        check_backend(spec(**given))


def test_chosen_gpus_are_the_only_visible_ones(monkeypatch):
    installed(monkeypatch, cpu=False, gpus=4)
    chosen = spec(backend="cuda", device="1,3")
    check_backend(chosen)
    assert vllm_plan.environment(chosen, "/run")["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_a_missing_vllm_is_told_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(vllm_plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError) as info:
        check_backend(spec())
    assert "rbee[cpu]" in info.value.hint
