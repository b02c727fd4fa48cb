"""Echo and vLLM (tiny model) keep the same contract."""

import importlib.util
import subprocess
import sys

import pytest

from rbee.testing.tiny_model import write_tiny_model

RULES = [
    "streams tokens and ends with length",
    "takes messages",
    "runs requests at once",
    "leaving aborts",
    "refuses what does not fit and runs nothing",
    "closing frees its processes",
    "death is noticed within a second",
]
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    "kind",
    [
        "echo",
        pytest.param(
            "vllm",
            marks=[
                pytest.mark.vllm,
                pytest.mark.skipif(
                    not HAS_VLLM, reason="vllm is not installed: pip install '.[cpu]'"
                ),
            ],
        ),
    ],
)
def test_an_engine_keeps_the_contract(kind, tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    argv = [sys.executable, "-m", "rbee.testing.engine_contract", kind, str(model)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert said == [f"ok {rule}" for rule in RULES]
