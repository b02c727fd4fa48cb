"""Models on other machines, as their users run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbee.nodes.node import Transport
from rbee.testing.hosts import Host, Hosts
from rbee.testing.network_deaths import KILLING, LEASE
from rbee.testing.processes import LeakCheck, Tree, carriers
from rbee.testing.tiny_model import write_tiny_model
from tests.cascade.far import BIN, User, end_all, open_far_hosts, register, titles, user
from tests.cascade.keeper import Done, infer, run, running_infer

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
MODEL = "echo?rate=20"
LONG = ("--max-tokens", "400")
PROC = ("cmdline", "environ", "comm")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_far_hosts("mac", "linux") as hosts:
        yield hosts


@pytest.fixture
def mac(hosts: Hosts) -> Iterator[Host]:
    yield hosts["mac"]
    if hosts["mac"].can_partition:
        hosts["mac"].heal()
    end_all(hosts["mac"])


@pytest.fixture
def me(hosts: Hosts, tmp_path: Path, nonce: str) -> Iterator[User]:
    with someone("me", hosts, nonce) as me:
        yield me


@contextmanager
def someone(name: str, hosts: Hosts, nonce: str) -> Iterator[User]:
    """Be a user; nothing that carries his nonce is left at his end."""
    base = Path("/tmp", f"rbee-{name}-{nonce[:6]}")  # unix sockets end at 107 bytes
    with Tree() as tree:
        me = user(base, hosts, nonce)
        check = LeakCheck(home=me.home, nonce=nonce, tree=tree, venv=None)  # hives may run on
        yield me
        check.wait_clean_sync(10)
    subprocess.run(["rm", "-rf", str(base)], check=True)


def wait_for(happened: Callable[[], object], within: float) -> None:
    until = time.monotonic() + within
    while not happened():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def standing_queen(me: User) -> Iterator[subprocess.Popen[bytes]]:
    """Run an operator's queen."""
    popen = subprocess.Popen([f"{BIN}/queen-rbee", "daemon"], env=me.environ)
    try:
        wait_for(me.home.queen_file.exists, 30)
        yield popen
    finally:
        popen.terminate()
        popen.wait()


@contextmanager
def taken_port(host: Host, port: int) -> Iterator[None]:
    """Have somebody listen where a hive of the host would."""
    code = (
        f"import socket; s = socket.create_server(({host.address!r}, {port})); "
        "print(flush=True); s.accept()"
    )
    popen = subprocess.Popen(host.argv("python3", "-c", code), stdout=subprocess.PIPE)
    try:
        assert popen.stdout is not None
        assert popen.stdout.readline()
        yield
    finally:
        popen.kill()
        popen.communicate()


def log_of_queen(me: User) -> list[str]:
    return (me.home.logs / "queen.log").read_text().splitlines()


def token_of(me: User) -> str:
    """Return what the user's running queen was given."""
    return Path(json.loads(me.home.queen_file.read_text())["token_file"]).read_text().strip()


def check_unseen(token: str, host: Host, *, but: Path | None = None) -> None:
    """See that nothing on the host shows the token: no command line, environment, file or log."""
    places = [Path(f"/proc/{one.pid}/{name}") for one in host.processes() for name in PROC]
    files = [path for path in (host.home / ".rbee").rglob("*") if path.is_file()]
    runs = [path for path in Path("/tmp").glob(f"rbee-{host.uid}-*/**/*") if path.is_file()]
    assert len(places) >= 12
    assert files
    assert runs
    check_none_holds(token, *places, *{*files, *runs} - {but})


def check_none_holds(token: str, *paths: Path) -> None:
    assert paths
    assert [path for path in paths if token.encode() in path.read_bytes()] == []


# one's own hive on the node ---------------------------------------------------------------------
@pytest.mark.parametrize("transport", list(Transport), ids=lambda one: one.value)
def test_a_model_answers_on_a_node_and_leaves_nothing(
    me: User, mac: Host, transport: Transport
) -> None:
    register(me.home, "mac", transport)
    with running_infer(MODEL, "--node", "mac", *LONG, env=me.environ) as running:
        running.read_some(20)
        there = titles(mac)
        check_unseen(token_of(me), mac)
        running.signal(signal.SIGINT)
        done = running.end()
    assert [one for one in there if one != "echo-engine"] == [
        "llm-worker-rbee", "rbee-guard", "rbee-guard", "rbee-guard", "rbee-hive", "rbee-zygote",
    ]  # fmt: skip
    assert done.code == 130
    steps = ["connect to mac", "preflight mac has rbee", "start a hive on mac", "ready after"]
    assert [step for step in steps if step in done.err] == steps
    called = [line for line in log_of_queen(me) if "on mac called back: it is ready" in line]
    assert len(called) == 1  # through a forward of SSH: our queen listens on loopback
    assert mac.processes() == []  # before the command had ended


def test_the_logs_of_a_node_are_told_after_its_end(me: User, mac: Host) -> None:
    register(me.home, "mac")
    with taken_port(mac, 9200):
        assert infer(MODEL, "--node", "mac", "--max-tokens", "2", env=me.environ).code == 0
    told = run("logs", "--node", "mac", "--json", env=me.environ).out.splitlines()
    logs = {json.loads(line)["log"] for line in told}
    assert "hive-mac" in logs
    hive = "".join(json.loads(line)["line"] for line in told if '"hive-mac"' in line)
    assert "port 9200 is taken, using" in hive
    worker = next(name for name in logs if name.startswith("worker-"))
    alone = run("logs", "--node", "mac", "--worker", worker, env=me.environ).out
    assert "llm-worker-rbee" in alone.splitlines()[0]
    refused = run("logs", "--node", "mac", "--worker", "nope", env=me.environ)
    refused.check_refusal("node mac: no log of a worker 'nope'")


def test_a_node_without_rbee_says_what_to_do(me: User, mac: Host) -> None:
    register(me.home, "mac", rbee_path="/nowhere/bin")
    done = infer(MODEL, "--node", "mac", env=me.environ)
    done.check_refusal("node mac has no /nowhere/bin/rbee-hive", "rbee-keeper node install mac")
    listed = json.loads(run("node", "list", "--json", env=me.environ).out)
    assert [node["status"] for node in listed] == ["ready", "unusable"]
    assert mac.processes() == []


# a silent node ----------------------------------------------------------------------------------
def test_streams_of_a_silent_node_end_and_a_healed_one_is_used_again(me: User, mac: Host) -> None:
    if not mac.can_partition:
        pytest.skip(mac.why_no_partition)
    register(me.home, "mac")
    with standing_queen(me):
        with running_infer(MODEL, "--node", "mac", *LONG, env=me.environ) as running:
            running.read_some(20)
            mac.partition()
            began = time.monotonic()
            done = running.end()
        assert done.code == 1
        assert time.monotonic() - began < 2 * LEASE + KILLING
        assert "the connection to node mac is lost" in done.errors[0]
        (hive,) = json.loads(run("hive", "list", "--json", env=me.environ).out)
        assert (hive["node"], hive["state"]) == ("mac", "unverified")  # nobody can tell yet
        wait_for(lambda: not mac.processes(), LEASE + KILLING)
        mac.heal()
        done = infer(MODEL, "--node", "mac", "--max-tokens", "4", env=me.environ)
        assert (done.code, done.out) == (0, "hello bee hello bee\n")
        assert "until nothing of the hive that was lost on mac can be left" in done.err
    wait_for(lambda: not mac.processes(), KILLING)


# an operator's hive on the node -----------------------------------------------------------------
def test_an_operators_hive_on_a_node_survives_keeper_and_queen(
    me: User, mac: Host, hosts: Hosts
) -> None:
    register(me.home, "mac")
    done = subprocess.run(
        ["bash", str(HERE / "persistent_ssh.sh"), str(hosts.ssh_config), "mac", BIN,
         "--model", MODEL, "--engine", "echo", "--prompt", "one two three"],
        env=me.environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # The queen has ended: her worker has gone, the hive has not. Another queen finds it again.
    wait_for(lambda: "llm-worker-rbee" not in titles(mac), LEASE + KILLING)
    hive = [one.pid for one in mac.processes() if one.title == "rbee-hive"]
    with standing_queen(me):
        told = infer(MODEL, "--node", "mac", "--max-tokens", "4", "--json", env=me.environ)
        assert json.loads(told.out)["node"] == "mac"  # its hive calls it localhost
        seen = json.loads(run("hive", "list", "--json", env=me.environ).out)
        assert [one["owner"] for one in seen] == ["operator"]
        refused = run("hive", "stop", "--node", "mac", env=me.environ)
        refused.check_refusal("not this queen's to end")
    assert [one.pid for one in mac.processes() if one.title == "rbee-hive"] == hive


def test_an_operators_token_is_read_over_ssh_and_shown_nowhere(
    me: User, mac: Host, hosts: Hosts
) -> None:
    register(me.home, "mac")
    subprocess.run(hosts.ssh("mac", f"{BIN}/rbee-hive daemon >/dev/null 2>&1 &"), check=True)
    wait_for(lambda: (mac.home / ".rbee/run/hive.json").exists(), 30)
    token_file = mac.home / ".rbee/token"
    token = token_file.read_text().strip()
    environ = me.environ | {"RBEE_LOG_LEVEL": "DEBUG"}
    with running_infer(MODEL, "--node", "mac", *LONG, env=environ) as running:
        running.read_some(20)
        assert token != token_of(me)
        check_unseen(token, mac, but=token_file)
        check_none_holds(token, *of_processes(me), *of_files(me))
        running.signal(signal.SIGINT)
        done = running.end()
    assert token not in done.out + done.err
    check_none_holds(token, *of_files(me))


def of_processes(me: User) -> list[Path]:
    """Return what the user's processes show."""
    pids = carriers(me.environ["RBEE_NONCE"])
    assert len(pids) >= 3
    return [Path(f"/proc/{pid}/{name}") for pid in pids for name in PROC]


def of_files(me: User) -> list[Path]:
    roots = (me.home.root, me.home.run)
    return [path for root in roots for path in root.rglob("*") if path.is_file()]


def test_a_queen_that_is_cut_off_costs_an_operators_hive_only_her_workers(
    me: User, mac: Host, hosts: Hosts
) -> None:
    if not mac.can_partition:
        pytest.skip(mac.why_no_partition)
    register(me.home, "mac")
    subprocess.run(hosts.ssh("mac", f"{BIN}/rbee-hive daemon >/dev/null 2>&1 &"), check=True)
    wait_for(lambda: (mac.home / ".rbee/run/hive.json").exists(), 30)
    with running_infer(MODEL, "--node", "mac", *LONG, env=me.environ) as running:
        running.read_some(10)
        mac.partition()
        wait_for(lambda: "llm-worker-rbee" not in titles(mac), LEASE + KILLING)
        assert "rbee-hive" in titles(mac)
        mac.heal()
        assert running.end().code == 1


def test_a_killed_queen_costs_an_operators_hive_only_her_own_workers(
    me: User, mac: Host, hosts: Hosts
) -> None:
    with someone("her", hosts, f"{os.urandom(8).hex()}") as her:
        for one in (me, her):
            register(one.home, "mac")
        subprocess.run(hosts.ssh("mac", f"{BIN}/rbee-hive daemon >/dev/null 2>&1 &"), check=True)
        wait_for(lambda: (mac.home / ".rbee/run/hive.json").exists(), 30)
        line = (MODEL, "--node", "mac", *LONG)
        with (
            running_infer(*line, env=me.environ) as mine,
            running_infer(*line, env=her.environ) as hers,
        ):
            mine.read_some(10)
            hers.read_some(10)
            assert titles(mac).count("llm-worker-rbee") == 2
            mine.signal(signal.SIGKILL)
            wait_for(lambda: titles(mac).count("llm-worker-rbee") == 1, LEASE + KILLING)
            hers.read_some(60)
            hers.signal(signal.SIGTERM)
            assert hers.end().code == 143
        wait_for(lambda: "llm-worker-rbee" not in titles(mac), LEASE + KILLING)
        assert "rbee-hive" in titles(mac)


def test_what_a_power_loss_left_on_a_node_is_told_and_reaped(
    me: User, mac: Host, hosts: Hosts
) -> None:
    register(me.home, "mac")
    subprocess.run(hosts.ssh("mac", f"{BIN}/rbee-hive daemon >/dev/null 2>&1 &"), check=True)
    run_file = mac.home / ".rbee/run/hive.json"
    wait_for(run_file.exists, 30)
    end_all(mac)
    told = run("reap", "--node", "mac", "--dry-run", "--json", env=me.environ)
    found = [(row["node"], row["kind"], row["outcome"]) for row in json.loads(told.out)]
    assert found == [("mac", "directory", "found"), ("mac", "file", "found")]
    assert run_file.exists()
    done = run("reap", "--node", "mac", env=me.environ)
    assert (done.code, done.out.count("ended")) == (0, 2)
    assert not run_file.exists()


# weights ----------------------------------------------------------------------------------------
def test_models_are_copied_and_fetched_as_the_user_means_them(me: User, mac: Host) -> None:
    register(me.home, "mac")
    tiny = write_tiny_model(me.home.root / "own/tiny")  # nobody else may look into it
    with me.home.config_file.open("a") as config:
        config.write(f"[aliases]\nmini = '{tiny}'\ngone = '/no/such'\n")
    token = "hf_" + "secret" * 4
    environ = me.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": token}

    def model(verb: str, *line: str) -> Done:
        return run("model", verb, *line, "--node", "mac", env=environ)

    copied = model("pull", "mini", "--copy")
    there = Path(copied.out.strip())
    assert there.parent == mac.home / ".rbee/models", copied.err
    with standing_queen(me):
        if os.geteuid() == 0:  # else the node, which is this machine, has it where it is
            assert model("pull", "mini").out == copied.out
        (info,) = json.loads(model("list", "--json").out)
        assert (info["node"], info["model"], info["damage"]) == ("mac", tiny.as_uri(), "")
        gone, refused = model("pull", "gone"), model("pull", "hf:org/private")
        assert "node mac: there is no model at /no/such" in gone.err
        assert "node mac: cannot fetch hf:org/private: http://127.0.0.1:9" in refused.err
        assert token not in gone.err + refused.err
        assert model("rm", "mini").code == 0
        assert not there.exists()
    kept = [*mac.home.rglob("*"), *me.home.root.rglob("*")]
    assert not [path for path in kept if path.is_file() and token.encode() in path.read_bytes()]
