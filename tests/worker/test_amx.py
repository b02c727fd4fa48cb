"""Which attention vLLM chooses; what it answers is held by tests/cascade/test_vllm.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rbee.worker import amx

MODULE = "vllm.v1.attention.backends.cpu_attn"


@pytest.fixture
def cpu_attn(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for vLLM's module, whose import takes many seconds."""
    module = SimpleNamespace(_get_attn_isa=lambda dtype, block_size: dtype)
    package, _, name = MODULE.rpartition(".")
    for parent in ("vllm", "vllm.v1", "vllm.v1.attention"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(__path__=[], **{name: module}))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def test_amx_is_replaced_and_every_other_choice_stays(cpu_attn: SimpleNamespace) -> None:
    amx.do_without_amx()
    amx.do_without_amx()
    assert cpu_attn._get_attn_isa("amx", block_size=32) == "vec"
    assert [cpu_attn._get_attn_isa(isa, 32) for isa in ("vec", "vec16", "neon")] == [
        "vec", "vec16", "neon",
    ]  # fmt: skip
    assert not hasattr(cpu_attn._get_attn_isa.__wrapped__, "__wrapped__")


def test_a_vllm_that_chooses_otherwise_is_left_as_it_is(cpu_attn: SimpleNamespace) -> None:
    del cpu_attn._get_attn_isa
    amx.do_without_amx()
    assert vars(cpu_attn) == {}


@pytest.mark.parametrize(
    ("parent", "nonce", "replaces"),
    [(None, "n", False), (object(), "", False), (object(), "n", True)],
)
def test_only_processes_spawned_by_a_worker_replace_it_by_themselves(
    cpu_attn: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    parent: object,
    nonce: str,
    replaces: bool,
) -> None:
    monkeypatch.setenv("RBEE_NONCE", nonce)
    monkeypatch.setattr(amx.multiprocessing, "parent_process", lambda: parent)
    amx.register()
    assert (cpu_attn._get_attn_isa("amx", 32) == "vec") == replaces
