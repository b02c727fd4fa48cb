"""A worker as a real process: how it ends, and what ends with it."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from rbee.home import write_atomic
from rbee.model import WorkerConfig, WorkerId, WorkerSpec
from rbee.testing.tiny_model import write_tiny_model
from rbee.wire import codec

from .test_engine_contract import HAS_VLLM

pytestmark = pytest.mark.slow
TOKEN = "secret"
READY = re.compile(rb"ready after")
URL = re.compile(rb"answers at (http://\S+?),")


class Running:
    """A worker process with its log in a file."""

    def __init__(self, argv, log, stdin=subprocess.DEVNULL):
        self.log = log
        with log.open("wb") as out:
            self.popen = subprocess.Popen(argv, stdin=stdin, stdout=out, stderr=out)
        self.pid = self.popen.pid

    def wait_log(self, pattern, limit=60.0):
        until = time.monotonic() + limit
        while time.monotonic() < until:
            if found := pattern.search(self.log.read_bytes()):
                return found
            if self.popen.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern.pattern!r} not in the log:\n{self.log.read_text()[-3000:]}")

    def client(self):
        url = self.wait_log(URL).group(1).decode()
        return httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False
        )

    def error(self):
        lines = self.log.read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("rbee-error ")]
        assert lines[-1] == line
        return json.loads(line.removeprefix("rbee-error "))

    def close(self):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        if self.popen.stdin:
            self.popen.stdin.close()


@pytest.fixture
def start(tmp_path, leaks):
    running = []

    def start_one(argv, **given):
        worker = Running(argv, tmp_path / f"worker-{len(running)}.log", **given)
        running.append(worker)
        leaks.tree.refresh(worker.pid)
        return worker

    yield start_one
    for worker in running:
        worker.close()


@pytest.fixture
def start_echo(start, tmp_path, short_path):
    write_atomic(tmp_path / "token", TOKEN)

    def start_one(*args, **given):
        options = {
            "--engine": "echo", "--model": "any", "--port": "0",
            "--token-file": str(tmp_path / "token"), "--run-dir": str(short_path),
        }  # fmt: skip
        words = [word for pair in options.items() if pair[0] not in args for word in pair]
        return start([sys.executable, "-m", "rbee.worker", *words, *args], **given)

    return start_one


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def wait_gone(pid, limit=2.0):
    """Wait for the end of a process that is not our child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], limit)[0], f"process {pid} is still there"
    finally:
        os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_ends_it_cleanly_with_its_engine(start_echo, number, short_path):
    worker = start_echo()
    worker.wait_log(READY)
    (engine,) = children(worker.pid)
    os.kill(worker.pid, number)
    os.kill(worker.pid, number)
    assert worker.popen.wait(5) == 0
    wait_gone(engine, 0)
    assert not list(short_path.glob("rbee-worker-*"))


def test_the_end_of_its_lifeline_ends_it(start_echo):
    worker = start_echo("--owned", stdin=subprocess.PIPE)
    worker.wait_log(READY)
    worker.popen.stdin.write(b"beat 1\n")
    worker.popen.stdin.close()
    assert worker.popen.wait(5) == 0


def test_without_owned_stdin_is_not_read(start_echo):
    worker = start_echo(stdin=subprocess.DEVNULL)
    worker.wait_log(READY)
    with worker.client() as client:
        assert client.get("/v1/ready").status_code == 200


def test_owned_without_a_model_it_takes_its_configuration_from_the_start_line(start, short_path):
    spec = WorkerSpec(WorkerId("told"), "any", engine="echo")
    config = WorkerConfig(spec, str(short_path), TOKEN, port=0)
    worker = start([sys.executable, "-m", "rbee.worker", "--owned"], stdin=subprocess.PIPE)
    worker.popen.stdin.write(b"start " + codec.dumps(config) + b"\nbeat 1\n")
    worker.popen.stdin.flush()
    worker.wait_log(READY)
    with worker.client() as client:
        assert client.get("/health").json()["id"] == "told"
    worker.popen.stdin.close()
    assert worker.popen.wait(5) == 0


def test_kill_9_of_the_worker_kills_its_engine(start_echo):
    worker = start_echo()
    worker.wait_log(READY)
    (engine,) = children(worker.pid)
    worker.popen.kill()
    wait_gone(engine, 1)


def test_death_of_the_engine_ends_it_with_an_error_within_a_second(start_echo):
    worker = start_echo()
    worker.wait_log(READY)
    (engine,) = children(worker.pid)
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    assert worker.popen.wait(5) == 1
    assert time.monotonic() - killed < 2
    assert worker.error()["code"] == "engine_died"


@pytest.mark.parametrize("fail", ["load", "canary"])
def test_a_failed_start_is_told_on_the_last_line_of_the_log(start_echo, fail):
    worker = start_echo("--engine-arg", f"fail={fail}")
    assert worker.popen.wait(20) == 1
    assert set(worker.error()) >= {"code", "message", "hint"}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--engine-arg", "nonsense"], 2, "KEY=VALUE"),
        (["--engine", "steam"], 1, "steam"),
        (["--device", "7"], 1, "device '7'"),
        (["--token-file", "/none/there"], 1, "token file"),
    ],
)
def test_a_bad_command_line_is_one_clear_error(start_echo, args, code, said):
    worker = start_echo(*args)
    assert worker.popen.wait(20) == code
    text = worker.log.read_text()
    assert said in text
    assert "Traceback" not in text


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['x', '--help']; from rbee.worker.__main__ import app\n"
    code += "try: app()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'vllm', 'hypercorn', 'httpx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


PROTECTED = """
import os, socket, sys
from rbee.worker import pdeath
listener = socket.create_server(("127.0.0.1", 0))
pair = socket.socketpair()
read, write = os.pipe()
pdeath.protect_forks(read)
pid = os.fork()
if pid == 0:
    grandchild = os.fork()
    if grandchild == 0:
        print("sleeping", flush=True)
        os.pause() if hasattr(os, "pause") else __import__("signal").pause()
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in (listener.fileno(), read)]
    kept = os.readlink(f"/proc/self/fd/{pair[0].fileno()}")
    print(names, kept.startswith("socket:"), grandchild, flush=True)
    __import__("signal").pause()
print(os.readlink(f"/proc/self/fd/{listener.fileno()}").startswith("socket:"), pid, flush=True)
__import__("signal").pause()
"""


def test_what_a_protected_process_forks_dies_with_it_and_has_none_of_its_sockets(start):
    worker = start([sys.executable, "-c", PROTECTED])
    found = worker.wait_log(re.compile(rb"(\[.*\]) True (\d+)"))
    assert found.group(1) == b"['/dev/null', '/dev/null']"
    child = int(worker.wait_log(re.compile(rb"^True (\d+)$", re.M)).group(1))
    worker.wait_log(re.compile(rb"sleeping"))
    worker.popen.kill()
    wait_gone(child, 1)
    wait_gone(int(found.group(2)), 1)


ZYGOTE = """
import os, sys
from rbee.model import WorkerConfig
from rbee.wire import codec
from rbee.worker.engine import engine_kind
config = codec.loads(sys.argv[1], WorkerConfig)
engine_kind("vllm").preload()
import torch
assert not torch.cuda.is_initialized()
threads = len(os.listdir("/proc/self/task"))
print("threads", threads, flush=True)
pid = os.fork()
if pid == 0:
    from rbee.worker.daemon import run_worker
    code = run_worker(config, lifeline=None)
    sys.stderr.flush()
    os._exit(code)
print("worker", pid, flush=True)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 127)
"""


@pytest.mark.vllm
@pytest.mark.alone
@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: pip install '.[cpu]'")
def test_vllm_forked_from_a_preloaded_process_serves_everything_and_dies_whole(
    start, tmp_path, short_path
):
    model = write_tiny_model(tmp_path / "tiny")
    spec = WorkerSpec(WorkerId("w"), "tiny", str(model), served_names=("small",))
    config = WorkerConfig(spec, str(short_path), TOKEN, port=0)
    zygote = start([sys.executable, "-c", ZYGOTE, codec.dumps(config).decode()])
    assert zygote.wait_log(re.compile(rb"threads (\d+)"), 120).group(1) == b"1"
    pid = int(zygote.wait_log(re.compile(rb"^worker (\d+)", re.M)).group(1))
    zygote.wait_log(READY, 120)
    (engine,) = engine_cores(pid)
    with zygote.client() as client:
        _execute_streams_and_ends(client)
        _the_openai_api_is_there(client)
        for path, body in (
            ("/execute", {"job_id": "gone", "prompt": "x", "max_tokens": 1500}),
            (
                "/v1/completions",
                {"model": "tiny", "prompt": "x", "max_tokens": 1500, "stream": True},
            ),
        ):
            _leaving_aborts(client, path, body)
    os.kill(pid, signal.SIGKILL)
    wait_gone(engine, 1)
    zygote.popen.wait(5)


def engine_cores(pid):
    """Pids of the worker's engine processes; they are forked by another thread than the first."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [c for c in found if b"EngineCore" in Path(f"/proc/{c}/cmdline").read_bytes()]


def _execute_streams_and_ends(client):
    body = {"job_id": "j", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    response = client.post("/execute", json=body)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text.count("event: end") == 1
    assert '"tokens_out":8,"stop_reason":"length"' in response.text


def _the_openai_api_is_there(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny", "small"]
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert "vllm:num_requests_running" in client.get("/metrics").text


def _leaving_aborts(client, path, body):
    with client.stream("POST", path, json=body) as response:
        chunks = response.iter_raw()  # dropping it would close the connection
        next(chunks)
        _wait_running(client, 1, 5)
    _wait_running(client, 0, 0.3)


def _wait_running(client, count, limit):
    until = time.monotonic() + limit
    while f"rbee_worker_engine_requests {count}.0\n" not in client.get("/metrics").text:
        assert time.monotonic() < until
