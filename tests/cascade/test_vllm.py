"""The main job with a real model: keeper, queen, hive, zygote, guard, worker, vLLM."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from rbee.daemon import read_run_file
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


@pytest.mark.alone
def test_a_real_model_answers_and_its_worker_stays_warm(queen: Home, nonce: str) -> None:
    with open_terminal() as terminal:
        first = keeper("infer", *CAPITAL, "--temperature", "0", stderr=terminal.fd)
    assert first.returncode == 0, terminal.text
    assert first.stdout == b"The capital of France is Paris.\n"
    assert any("VLLM::EngineCore" in title_of(pid) for pid in carriers(nonce))
    (worker,) = workers()
    # Where the weights are read within one look, their share is never seen.
    assert re.search(r"vllm on cpu · (config|weights|KV cache|generating)", terminal.text)
    shares = [int(share) for share in re.findall(r"· weights [━╌]+ +(\d+) %", terminal.text)]
    assert shares == sorted(shares)

    times, text = arrivals(
        "infer", "--model", "smollm2-135m", "--prompt", "Tell me about bees.",
        "--max-tokens", "12", "--temperature", "0",
    )  # fmt: skip
    assert len(text) > 20
    assert len(set(times)) >= 5
    assert times[-1] - times[0] > 0.05

    assert [w["pid"] for w in workers()] == [worker["pid"]]
    found = read_run_file(queen.queen_file)
    assert found is not None
    token = queen.token_file.read_text().strip()
    ask_by_openai(found.url, token)
    ask_by_anthropic(found.url, token)
    for streams in (True, False, False, False):
        leave_in_the_middle(found.url, worker["url"], token, streams=streams)
    assert [w["pid"] for w in workers()] == [worker["pid"]]


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


MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


def ask_by_openai(url: str, token: str) -> None:
    """Ask the queen what OpenAI's own client can ask."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as client:
        chat = partial(
            client.chat.completions.create, model="smollm2-135m", messages=MESSAGES, temperature=0
        )
        whole = chat(logprobs=True, top_logprobs=2)
        assert "Paris" in str(whole.choices[0].message.content)
        assert whole.choices[0].logprobs is not None
        assert len(chat(n=2, temperature=1, max_tokens=3).choices) == 2
        parts = list(chat(stream=True, stream_options={"include_usage": True}))
        assert "Paris" in "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
        assert parts[-1].usage.completion_tokens > 0
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        kind: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        said = chat(response_format=kind, max_tokens=200).choices[0].message.content
        assert isinstance(json.loads(str(said))["a"], bool)
        asked = str(MESSAGES[0]["content"])  # an answer of a few words, on the slowest machine too
        done = client.responses.create(
            model="smollm2-135m", input=asked, temperature=0, stream=True
        )
        assert list(done)[-1].type == "response.completed"
        assert (
            client.completions.create(model="smollm2-135m", prompt="a", max_tokens=4)
            .choices[0]
            .text
        )
        assert "smollm2-135m" in [model.id for model in client.models.list()]
        with pytest.raises(openai.BadRequestError):
            chat(max_tokens=-3)


def ask_by_anthropic(url: str, token: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key=token, max_retries=0) as client:
        ask = partial(
            client.messages.create, model="smollm2-135m", max_tokens=20, messages=MESSAGES
        )
        assert "Paris" in ask(extra_body={"temperature": 0}).content[0].text
        assert [event.type for event in ask(stream=True, max_tokens=4)][-1] == "message_stop"


def leave_in_the_middle(url: str, worker: str, token: str, *, streams: bool) -> None:
    """Leave a long answer; the engine is free within 0.3 s, as vLLM itself tells."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = {"model": "smollm2-135m", "messages": MESSAGES, "max_tokens": 1500, "stream": streams}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
            + token.encode()
            + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
            + data
        )
        wait_for_requests(worker, token, 1, 5)
    wait_for_requests(worker, token, 0, 0.3)


RUNNING = ("rbee_worker_engine_requests", "vllm:num_requests_running")


def check_vllms_names(figures: str) -> None:
    """See that vLLM exports what the dashboard shows of it."""
    dashboard = Path(__file__).parents[2] / "docs" / "grafana.json"
    names = set(re.findall(r"vllm:\w+", dashboard.read_text()))
    assert names
    assert names <= set(re.findall(r"^vllm:\w+", figures, re.M))


def wait_for_requests(worker: str, token: str, count: int, limit: float) -> None:
    """Wait until so many requests are in a worker's engine."""
    request = urllib.request.Request(f"{worker}/metrics")
    request.add_header("Authorization", f"Bearer {token}")
    until = time.monotonic() + limit
    while True:
        asked = time.monotonic()
        with urllib.request.urlopen(request, timeout=10) as response:
            figures = response.read().decode()
        if all(re.search(rf"^{name}(?:{{.*}})? {count}\.0$", figures, re.M) for name in RUNNING):
            check_vllms_names(figures)
            return
        assert asked < until, f"not {count} after {limit} s"
