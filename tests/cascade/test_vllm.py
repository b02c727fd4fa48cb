"""The main job with a real model: keeper, queen, hive, zygote, guard, worker, vLLM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee.home import Home
from rbee.testing.processes import LeakCheck, carriers, title_of
from rbee.testing.tiny_model import write_tiny_model
from tests.terminal import open_terminal

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CAPITAL = ("--model", "smollm2-135m", "--prompt", "What is the capital of France?")


def keeper(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "rbee", *arguments]
    environment = os.environ | {"TERM": "xterm"}
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=stderr, timeout=300, env=environment)


def arrivals(*arguments: str) -> tuple[list[float], bytes]:
    """Run a command and return when something came on its stdout, and all of it."""
    times, text = [], b""
    argv = [sys.executable, "-m", "rbee", *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            times.append(time.monotonic())
            text += data
    assert process.returncode == 0
    return times, text


@pytest.fixture
def queen(home: Home, nonce: str, leaks: LeakCheck, shared_models: Path) -> Iterator[Home]:
    """Keep an operator's queen, and at the end see that nothing of it is left."""
    pytest.importorskip("vllm", reason="needs vLLM: pip install '.[cpu]'")
    home.models.rmdir()
    home.models.symlink_to(shared_models)
    started = keeper("queen", "start", "--port", "0")
    assert started.returncode == 0, started.stderr.decode()
    yield home
    stopped = keeper("queen", "stop")
    assert stopped.returncode == 0, stopped.stderr.decode()
    leaks.wait_clean_sync(2)


def workers() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(keeper("worker", "list", "--json").stdout)
    return found


def test_a_real_model_answers_and_its_worker_stays_warm(queen: Home, nonce: str) -> None:
    with open_terminal() as terminal:
        first = keeper("infer", *CAPITAL, "--temperature", "0", stderr=terminal.fd)
    assert first.returncode == 0, terminal.text
    assert first.stdout == b"The capital of France is Paris.\n"
    assert any("VLLM::EngineCore" in title_of(pid) for pid in carriers(nonce))
    (worker,) = workers()
    shares = [int(share) for share in re.findall(r"· weights [━╌]+ +(\d+) %", terminal.text)]
    assert any(share > 0 for share in shares), terminal.text
    assert shares == sorted(shares)

    times, text = arrivals(
        "infer", "--model", "smollm2-135m", "--prompt", "Tell me about bees.",
        "--max-tokens", "20", "--temperature", "0",
    )  # fmt: skip
    assert len(text) > 20
    assert len(set(times)) >= 5
    assert times[-1] - times[0] > 0.05

    assert [w["pid"] for w in workers()] == [worker["pid"]]
    assert "Paris" in ask_openai(worker["url"], queen)


def test_of_two_models_with_room_for_one_the_idle_one_goes(
    home: Home, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    home.config_file.write_text('[hive]\nmemory = "1536M"\n')  # one is planned at 1.1 GiB
    request.getfixturevalue("queen")
    models = [str(write_tiny_model(tmp_path / name)) for name in ("a", "b")]
    pids = []
    for model in (*models, models[0]):
        done = keeper("infer", "--model", model, "--prompt", "bee", "--max-tokens", "3")
        assert done.returncode == 0, done.stderr.decode()
        (worker,) = workers()
        assert worker["model"] == f"file://{model}"
        pids.append(worker["pid"])
    assert len(set(pids)) == 3
    assert b"unload what was not used" in done.stderr
    refused = keeper(
        "infer", "--model", models[1], "--prompt", "bee", "--kv-cache", "1G", "--max-tokens", "3"
    )
    assert refused.returncode == 1
    assert b"not enough memory" in refused.stderr
    assert b"available 1.5 GiB" in refused.stderr
    assert [worker["pid"] for worker in workers()] == pids[-1:]  # in vain it does not go


def ask_openai(url: str, home: Home) -> str:
    """Ask through vLLM's own API, which the worker serves beside ours."""
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {home.token_file.read_text().strip()}")
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return str(answer["choices"][0]["message"]["content"])
