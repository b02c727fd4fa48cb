"""What a worker would take is counted before it is started, and told in full if it is too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee.errors import BadInputError, InsufficientError
from rbee.gpus import Gpu
from rbee.hints import infer
from rbee.machine import Machine, Memory
from rbee.models import footprint as settling
from rbee.models import memory
from rbee.models.footprint import (
    CPU_KV_CACHE,
    CUDA_OVERHEAD,
    DTYPES,
    MIB,
    MemoryPlan,
    check_dtype,
    footprint,
    stored_dtype,
)
from rbee.models.kv_cache import cache_shape
from rbee.models.memory import check_room, free_memory, plan_memory
from rbee.models.preflight import OVERHEAD
from rbee.testing.tiny_model import write_tiny_model
from rbee.wire.messages import StartWorker

GIB = 1 << 30
OLD = Machine(frozenset({"avx2"}), 4, "x86_64")
NEW = Machine(frozenset({"avx512_bf16"}), 4, "x86_64")
# SmolLM2-135M and Llama-2-7B, as their config.json has them
GQA = {
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
}  # fmt: skip
MHA = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}


@attrs.frozen
class Local:
    directory: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Any:
    """Make a model that says something else of itself; its weights stay the tiny ones."""

    def make(**config: Any) -> Path:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        for file in tiny.iterdir():
            if not (directory / file.name).exists():
                (directory / file.name).symlink_to(file)
        (directory / "config.json").unlink()
        old = json.loads((tiny / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(old | config))
        return directory

    return make


def asked(**given: Any) -> StartWorker:
    return StartWorker("tiny", **given)


# the KV cache -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "item", "token"),
    [
        (GQA, 4, 2 * 30 * 3 * 64 * 4),  # 46,080 bytes
        (GQA, 2, 23_040),
        (GQA | {"head_dim": 128}, 2, 46_080),
        (MHA, 2, 2 * 32 * 32 * 128 * 2),  # 512 KiB
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 2, 36_864),  # GPT-2
        ({"num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 2, 27 * 576 * 2),
        ({"num_hidden_layers": 4}, 2, 0),
        ({"num_hidden_layers": 4, "num_attention_heads": [1, 2], "hidden_size": 8}, 2, 0),
    ],
)
def test_a_token_takes_its_keys_and_values_in_each_layer(
    config: dict[str, Any], item: int, token: int
) -> None:
    shape = cache_shape(config, item)
    assert (shape.token, shape.window_token) == (token, 0)
    assert bool(shape) is (token > 0)


def test_a_request_takes_whole_blocks_and_the_engine_one_more() -> None:
    shape = cache_shape(GQA, 4)
    assert shape.size(8192) == 46_080 * 128 * (64 + 1)
    assert shape.size(8193) == 46_080 * 128 * (65 + 1)
    assert shape.size(8192, 4) == 46_080 * 128 * (4 * 64 + 1)


def test_heads_are_split_over_devices_as_far_as_there_are_any() -> None:
    assert cache_shape(MHA, 2, devices=4).token == cache_shape(MHA, 2).token // 4
    assert cache_shape(GQA, 2, devices=4).token == cache_shape(GQA, 2).token // 3


def test_a_layer_with_a_window_keeps_the_window_and_what_is_being_computed() -> None:
    kinds = ["sliding_attention"] * 20 + ["full_attention"] * 5 + ["linear_attention"] * 5
    config = GQA | {"sliding_window": 512, "layer_types": kinds}
    shape = cache_shape(config, 2)
    layer = 2 * 3 * 64 * 2
    assert (shape.token, shape.window_token, shape.window) == (5 * layer, 20 * layer, 512)
    held = (512 + 16384) // 128 + 2
    assert shape.size(131_072) == 128 * layer * (5 * (1024 + 1) + 20 * held)
    assert cache_shape(GQA | {"sliding_window": 512, "model_type": "mistral"}, 2).token == 0
    unused = GQA | {"sliding_window": 512, "use_sliding_window": False, "model_type": "qwen2"}
    assert cache_shape(unused, 2) == cache_shape(GQA, 2)


# the plan ---------------------------------------------------------------------------------------
def test_a_plan_is_weights_in_the_target_dtype_cache_and_overhead(tiny: Path) -> None:
    parameters = footprint(tiny, asked(dtype="float32"), OLD).plan.weights // 4
    half = footprint(tiny, asked(dtype="half"), OLD).plan
    assert half.weights == 2 * parameters > 0
    assert half.kv == CPU_KV_CACHE
    assert half.required == half.weights + CPU_KV_CACHE + OVERHEAD


def test_the_dtype_is_the_machines_where_nobody_asks(tiny: Path) -> None:
    assert footprint(tiny, asked(), OLD).dtype == "float32"
    assert footprint(tiny, asked(), NEW).dtype == "auto"
    plans = [footprint(tiny, asked(), machine).plan for machine in (OLD, NEW)]
    assert plans[0].weights == 2 * plans[1].weights


def test_quantised_weights_stay_as_they_are(model: Any, tiny: Path) -> None:
    plain = footprint(tiny, asked(dtype="bfloat16"), OLD).plan.weights
    stored = (tiny / "model.safetensors").stat().st_size
    quantised = footprint(model(quantization_config={}), asked(dtype="bfloat16"), OLD).plan.weights
    assert plain < quantised <= stored == pytest.approx(2 * plain, rel=0.1)


def test_the_cache_is_for_the_asked_context_and_sequences(model: Any) -> None:
    big = model(max_position_embeddings=1 << 20)
    plan = footprint(big, asked(max_model_len=65_536, max_num_seqs=3, dtype="float32"), OLD).plan
    token = 2 * 2 * 1 * 32 * 4  # two layers, one head for keys and values
    assert plan.kv == token * 128 * (3 * 512 + 1)
    assert footprint(big, asked(max_model_len=1 << 20), OLD).plan.kv == token * 128 * 8193


def test_what_was_asked_for_the_cache_wins(tiny: Path) -> None:
    given = asked(kv_cache_bytes=100 << 40, max_num_seqs=64)
    assert plan_memory(Local(tiny), given).kv == 100 << 40
    with pytest.raises(BadInputError, match="too small") as caught:
        plan_memory(Local(tiny), asked(kv_cache_bytes=1000))
    assert "--kv-cache " in caught.value.hint


def test_a_cache_of_bytes_takes_half_or_a_quarter(tiny: Path) -> None:
    given = asked(max_num_seqs=8, engine_args={"kv_cache_dtype": "fp8"}, dtype="float32")
    full = footprint(tiny, asked(max_num_seqs=8, dtype="float32"), OLD).plan
    assert footprint(tiny, given, OLD).plan.kv * 4 == full.kv


def test_a_share_of_the_memory_is_respected(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "node_memory", lambda: Memory(100 * GIB, 0))
    found = footprint(tiny, asked(engine_args={"gpu_memory_utilization": "0.25"}), OLD)
    assert found.fraction == 0.25
    assert found.plan.required == 25 * GIB
    assert footprint(tiny, asked(engine_args={"gpu-memory-utilization": "x"}), OLD).fraction is None
    with pytest.raises(BadInputError, match=r"=0.001 of 100.0 GiB is too small") as caught:
        footprint(tiny, asked(engine_args={"device-memory-utilization": "0.001"}), OLD)
    assert caught.value.hint.endswith("gpu-memory-utilization=0.01")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_model_len": 99_999}, "99999 is more than the model's context of 2048"),
        ({"max_model_len": 1}, "at least 2"),
        ({"dtype": "float8"}, "needed: auto, half, float16, bfloat16, float, float32"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tiny: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInputError, match=said) as caught:
        plan_memory(Local(tiny), asked(**given))
    assert caught.value.hint.startswith("rbee-keeper infer --")


# CUDA -------------------------------------------------------------------------------------------
def cuda(**given: Any) -> StartWorker:
    return asked(backend="cuda", **given)


def test_several_gpus_share_weights_and_cache(model: Any) -> None:
    big = model(num_key_value_heads=2)
    one = footprint(big, cuda(device="0"), OLD).plan
    two = footprint(big, cuda(device="0,1"), OLD).plan
    assert two.weights == -(-one.weights // 2)
    assert two.kv * 2 == one.kv
    assert two.overhead == one.overhead == CUDA_OVERHEAD


def test_on_a_gpu_the_cache_grows_as_far_as_there_is_room(model: Any) -> None:
    found = footprint(model(max_position_embeddings=131_072), cuda(), OLD)
    plan = found.plan
    token = 2 * 2 * 1 * 32 * 2
    assert found.context is None  # vLLM takes what its cache has room for
    assert plan.kv == token * 128 * (64 + 1)
    most = token * 128 * (1024 + 1)
    assert plan.kv_wish == most
    assert plan.pool(plan.required) == plan.kv
    assert plan.pool(plan.required + 3 * plan.kv) == 2 * plan.kv  # the other half stays free
    assert plan.pool(80 * GIB) == most
    assert footprint(model(), cuda(max_num_seqs=2), OLD).plan.kv_wish == 0


def test_the_fullest_of_several_gpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Gpu(0, "a", 80, 70), Gpu(1, "b", 80, 20)]
    monkeypatch.setattr(memory, "chosen_gpus", lambda device: cards if device == "0,1" else [])
    assert free_memory("cuda", "0,1") == 20
    assert free_memory("cuda", None) is None
    assert (free_memory("cpu", None) or 0) > MIB


def test_the_least_of_machine_node_and_container_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"available_memory": 50, "node_memory": Memory(9, 30), "cgroup_memory": None}
    for name, found in limits.items():
        monkeypatch.setattr(memory, name, lambda found=found: found)
    assert free_memory("cpu", None) == 30
    monkeypatch.setattr(memory, "cgroup_memory", lambda: Memory(9, 20))
    assert free_memory(None, None) == 20


# the check --------------------------------------------------------------------------------------
@pytest.fixture
def plan() -> MemoryPlan:
    """Llama-2-7B in bfloat16 with one request of 4096 tokens."""
    shape = cache_shape(MHA, 2)
    return MemoryPlan(
        13 * GIB, shape.size(4096), GIB, context=4096, limit=4096, shape=shape
    )  # fmt: skip


def test_what_fits_or_is_unknown_is_not_refused(plan: MemoryPlan) -> None:
    check_room(plan, plan.required, model="m")
    check_room(plan, None, model="m")


def test_too_little_memory_tells_the_parts_and_the_biggest_context(plan: MemoryPlan) -> None:
    with pytest.raises(InsufficientError) as caught:
        check_room(plan, 15 * GIB, model="llama")
    error = caught.value
    assert error.message == (
        "not enough memory for llama: needed 16.1 GiB (weights 13.0 GiB, KV cache 2.1 GiB, "
        "engine 1.0 GiB), available 15.0 GiB; the biggest context that would fit is 1920 tokens"
    )
    assert error.hint == infer("--max-model-len", 1920, model="llama")
    assert error.http_status == 507
    assert error.details == {
        "required": plan.required, "available": 15 * GIB, "weights": 13 * GIB, "kv": plan.kv,
        "overhead": GIB, "biggest_context": 1920,
    }  # fmt: skip


def test_the_biggest_context_fits_and_one_more_token_does_not(plan: MemoryPlan) -> None:
    for available in (14 * GIB + 300 * MIB, 15 * GIB, 16 * GIB):
        biggest = plan.biggest_context(available)
        room = plan.room(available)
        assert plan.shape.size(biggest) <= room < plan.shape.size(biggest + 1)
    assert plan.biggest_context(100 * GIB) == 4096
    assert plan.biggest_context(13 * GIB) == 0


def test_the_hint_makes_it_fit_or_frees_memory(plan: MemoryPlan) -> None:
    fixed = attrs.evolve(plan, kv=50 * GIB, kv_floor=50 * GIB)
    cases = [
        (fixed, 17 * GIB, " --kv-cache 3072M"),
        (fixed, 22 * GIB, " --kv-cache 4096M"),
        (fixed, 15 * GIB, " --max-model-len 1920 --kv-cache 1024M"),
        (plan, 13 * GIB, "rbee-keeper worker list"),
    ]
    for given, available, hint in cases:
        with pytest.raises(InsufficientError) as caught:
            check_room(given, available, model="m")
        assert hint in caught.value.hint


def test_without_a_shape_only_the_whole_counts() -> None:
    unknown = MemoryPlan(10, 5, 1, context=100)
    assert unknown.biggest_context(16) == 100
    assert unknown.biggest_context(15) == 0
    with pytest.raises(InsufficientError, match="no context is short enough"):
        check_room(unknown, 15, model="m")


def test_several_devices_are_told(plan: MemoryPlan) -> None:
    with pytest.raises(InsufficientError, match="on each of 2 devices"):
        check_room(attrs.evolve(plan, devices=2), GIB, model="m")


# dtypes -----------------------------------------------------------------------------------------
def test_the_dtypes_are_vllms() -> None:
    assert {name: check_dtype(name) for name in DTYPES} == DTYPES
    assert check_dtype(None) is None


def test_weights_are_stored_in_what_they_will_be_used_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored_dtype("cpu", "half") == "float16"
    assert stored_dtype("cuda", None) == stored_dtype("cuda", "auto") == "bfloat16"
    for own, stored in (("float32", "float32"), ("auto", "bfloat16")):
        monkeypatch.setattr(settling, "_own_dtype", lambda own=own: own)
        assert stored_dtype(None, None) == stored
