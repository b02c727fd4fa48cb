"""``node add``, by hand: a real sshd is tried, and nothing is saved of what does not answer."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee import __version__
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.testing.hosts import Host, Hosts
from tests.machines import BIN, DETECTED, User, make_user, open_machines, plant, plant_detect
from tests.ssh.sshd import keygen

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]
ALIAS = ["--from-ssh-config", "mac"]
KILL_SESSION = """
sshd=$(cut -d' ' -f4 /proc/$PPID/stat)  # the guard's parent
grep -q sshd /proc/$sshd/comm && kill -9 $sshd
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_machines("mac", "gate") as hosts:
        yield hosts


@pytest.fixture
def mac(hosts: Hosts) -> Host:
    return hosts["mac"]


@pytest.fixture
def user(hosts: Hosts, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    return make_user(hosts, tmp_path / "user", monkeypatch)


@pytest.fixture
def stranger(hosts: Hosts, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """Be a user who has never been on the hosts."""
    return make_user(hosts, tmp_path / "user", monkeypatch, knows=False)


def saved(home: Home) -> list[Node]:
    return NodeStore.of(home)._read_all()


def add(*flags: str) -> int:
    return run_line(["node", "add", "mac", *flags])


def keeper(*flags: str, **given: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "rbee", "node", "add", "mac", *ALIAS, *flags]
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **given
    )


def test_a_machine_that_has_rbee_is_saved_with_what_it_has(
    user: User, mac: Host, home: Home, capfd: Captured
) -> None:
    assert add(*ALIAS, "--rbee-path", BIN, "--json") == 0
    out, err = capfd.readouterr()
    told, (node,) = json.loads(out), saved(home)
    assert told["capabilities"] == node.capabilities
    assert (told["status"], told["capabilities"]["rbee"]) == ("ready", __version__)
    assert node.capabilities["devices"][0]["backend"] == "cpu"
    steps = ("keeper: connect to mac", "keeper: detect what mac has", "saved mac (ready)")
    places = [err.find(step) for step in steps]
    assert -1 < places[0] < places[1] < places[2]
    assert mac.processes() == []


# host keys ----------------------------------------------------------------------------------------
def test_an_unknown_host_key_is_shown_and_refused_where_nobody_can_be_asked(
    stranger: User, mac: Host, home: Home, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert add(*ALIAS, "--env", "API_TOKEN=hush") == 1
    err = capfd.readouterr().err
    shown = subprocess.check_output(["ssh-keygen", "-lf", str(mac.place.host_key)], text=True)
    assert f"it offers {shown.split()[1]}" in err
    again = 'rbee-keeper node add mac --from-ssh-config mac --env "API_TOKEN=$API_TOKEN"'
    assert f"hint: {again} --accept-new-host-key" in err
    assert "hush" not in err
    assert not stranger.known_hosts.exists()
    assert saved(home) == []


def test_unknown_host_keys_are_accepted_by_a_flag_on_every_hop(
    stranger: User, hosts: Hosts, home: Home, capfd: Captured
) -> None:
    stranger.config.write_text("Host mac\n  ProxyJump gate\n" + stranger.config.read_text())
    path = plant_detect(hosts["mac"])
    assert add(*ALIAS, "--rbee-path", path, "--accept-new-host-key") == 0
    names = {line.split()[0] for line in stranger.known_hosts.read_text().splitlines()}
    assert names == {host.place.spelled[1] for host in hosts.values()}
    assert capfd.readouterr().err.count("accepted the host key") == 2
    assert [node.status.value for node in saved(home)] == ["ready"]
    capfd.readouterr()
    assert run_line(["node", "check", "mac"]) == 0  # no address of it is reached from here
    assert " through SSH is open to us" in capfd.readouterr().out


def test_a_file_that_keeps_no_host_key_is_no_endless_question(
    stranger: User, home: Home, capfd: Captured
) -> None:
    text = stranger.config.read_text()
    stranger.config.write_text(text.replace(str(stranger.known_hosts), "/dev/null"))
    assert add(*ALIAS, "--accept-new-host-key") == 1
    err = capfd.readouterr().err
    assert err.count("accepted the host key") == 1
    assert "nobody has vouched" in err


@pytest.mark.parametrize(("answer", "code", "kept"), [("\n", 1, False), ("y\n", 0, True)])
def test_whoever_sits_at_a_terminal_is_asked(
    stranger: User, mac: Host, home: Home, answer: str, code: int, kept: bool
) -> None:
    ours, terminal = os.openpty()
    os.write(ours, answer.encode())
    with keeper("--rbee-path", plant_detect(mac), stdin=terminal) as process:
        _, err = process.communicate(timeout=60)
    os.close(terminal)
    os.close(ours)
    assert process.returncode == code, err
    assert "nobody has vouched yet for the host key" in err
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in err
    assert "Is it the right one? [y/N]" in err
    assert (stranger.known_hosts.exists(), len(saved(home)) == 1) == (kept, kept)


def test_a_changed_host_key_is_refused_whatever_is_accepted(
    user: User, home: Home, tmp_path: Path, capfd: Captured
) -> None:
    keygen(tmp_path / "other")
    public = (tmp_path / "other.pub").read_text()
    lines = user.known_hosts.read_text().splitlines()
    before = "".join(f"{line.split()[0]} {public}" for line in lines)
    user.known_hosts.write_text(before)
    assert add(*ALIAS, "--accept-new-host-key") == 1
    err = capfd.readouterr().err
    assert "is not the one that is known" in err
    assert "hint: ssh-keygen -R" in err
    assert user.known_hosts.read_text() == before
    assert saved(home) == []


# what is not saved --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "code", "why", "hint"),
    [
        (["--host", "127.0.0.1", "--port", "1"], 1, "Connection refused", "-p 1 127.0.0.1 -v true"),
        (["--host", "no-such.invalid"], 1, "has no address", "getent hosts no-such.invalid"),
        (["--from-ssh-config", "max"], 1, "did you mean 'mac'?", "grep"),
        (["--key", "/nowhere/id"], 1, "no key file /nowhere/id", "ls"),
        (["--host", "a;b"], 1, "neither a host name", "--host"),
        (
            ["--user", "$(id)"],
            1,
            "the SSH user '$(id)' contains",
            "rbee-keeper node add mac --user",
        ),
        ([*ALIAS, "--user", "me"], 1, "excludes --user", "--user"),
        ([*ALIAS, "--rbee-path", "bin"], 1, "is relative", "--rbee-path"),
        ([*ALIAS, "--env", "HF_TOKEN=hush"], 1, "never stored", "export"),
        (["--port", "x"], 2, "port 'x'", "rbee-keeper node add mac --port 22"),
        (["--transport", "tcp"], 2, "transport", "--help"),
    ],
)
def test_what_is_wrong_or_not_there_is_one_error(
    user: User, home: Home, capfd: Captured, flags: list[str], code: int, why: str, hint: str
) -> None:
    assert add(*flags) == code
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith(("error: ", "  hint: "))]
    assert len(errors) == 2
    assert why in errors[0]
    assert hint in errors[1]
    assert "hush" not in err
    assert out == ""
    assert saved(home) == []


def test_a_name_is_checked_before_anything_is_tried(user: User, capfd: Captured) -> None:
    for name, why in (("Mac", "not valid"), ("localhost", "is this machine"), ("a;b", "not valid")):
        assert run_line(["node", "add", name, *ALIAS]) == 1
        err = capfd.readouterr().err
        assert why in err
        assert "connect" not in err


def test_a_wrong_key_is_offered_once(
    user: User, mac: Host, home: Home, tmp_path: Path, capfd: Captured
) -> None:
    keygen(tmp_path / "wrong")
    before = mac.log.read_text().count("Connection from")
    flags = ["--host", mac.address, "--port", str(mac.port), "--user", mac.user]
    assert add(*flags, "--key", str(tmp_path / "wrong")) == 1
    err = capfd.readouterr().err
    assert f"did not let user {mac.user} in; offered: {tmp_path / 'wrong'}" in err
    assert mac.log.read_text().count("Connection from") == before + 1
    assert saved(home) == []


def test_a_full_disk_is_told(user: User, mac: Host, home: Home, capfd: Captured) -> None:
    if not mac.can_partition:
        pytest.skip(mac.why_no_partition)
    full = mac.home / "full"
    script = f"mkdir {full} && mount -t tmpfs -o size=64k none {full}"
    mac.run(["sh", "-c", script], root=True)
    assert add(*ALIAS, "--rbee-path", BIN, "--env", f"RBEE_HOME={full}/rbee") == 1
    err = capfd.readouterr().err
    assert "node mac has 64.0 KiB of disk left where its RBEE_HOME is" in err
    assert "hint: ssh mac df -h" in err
    assert saved(home) == []


def test_a_rbee_that_says_why_it_fails_is_quoted(
    user: User, mac: Host, home: Home, capfd: Captured
) -> None:
    script = "#!/bin/sh\nprintf 'error: config.toml is wrong\\n  hint: x\\n' >&2\nexit 2\n"
    path = plant(mac, script, "it's $(touch here); dir")
    assert add(*ALIAS, "--rbee-path", path) == 1
    error, hint = capfd.readouterr().err.splitlines()[-2:]
    assert error.endswith("failed with code 2: config.toml is wrong")
    words = shlex.split(hint.removeprefix("  hint: "))
    assert words[:2] == ["ssh", "mac"]
    assert shlex.split(words[2]) == [f"{path}/rbee-hive", "detect"]
    assert saved(home) == []


def test_an_environment_comes_as_it_was_given(user: User, mac: Host, home: Home) -> None:
    script = f"#!{sys.executable}\nimport os\nprint(os.environ['FOUND'])\n"
    found = json.dumps(DETECTED | {"odd": "a b\"'; $(touch x) `y` \\"})
    assert add(*ALIAS, "--rbee-path", plant(mac, script), "--env", f"FOUND={found}") == 0
    (node,) = saved(home)
    assert node.capabilities == json.loads(found)


# what an install mends ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("", "has no program"),
        ("#!/nowhere/python\n", "is broken: "),
        ("#!/bin/sh\necho 'Traceback: No module named cyclopts' >&2; exit 1\n", "cyclopts"),
        ('#!/bin/sh\necho \'{"rbee": "0.0.1"}\'\n', "has rbee 0.0.1 in "),
        ("#!/bin/sh\necho '<html>'\n", "said '<html>\\n'"),
        ("#!/bin/sh\n", "said nothing"),
        (f'#!/bin/sh\necho \'{{"rbee": "{__version__}"}}\'\n', "do not understand"),
    ],
)
def test_a_machine_without_our_rbee_is_saved_for_an_install(
    user: User, mac: Host, home: Home, capfd: Captured, script: str, why: str
) -> None:
    path = plant(mac, script) if script else "~/nowhere"
    assert add(*ALIAS, "--rbee-path", path, "--json") == 0
    out, err = capfd.readouterr()
    (node,) = saved(home)
    assert node.status.value == json.loads(out)["status"] == "unusable"
    assert why in node.last_error
    assert f"no hive can run there yet: {node.last_error}\n" in err
    assert err.endswith("  hint: rbee-keeper node install mac\n")


def test_a_connection_that_is_cut_saves_nothing(
    user: User, mac: Host, home: Home, capfd: Captured
) -> None:
    path = plant(mac, f"#!/bin/sh\n{KILL_SESSION}\nexec sleep 60\n")
    assert add(*ALIAS, "--rbee-path", path) == 1
    assert "hint: ssh mac -v true" in capfd.readouterr().err
    assert saved(home) == []


def test_ctrl_c_while_it_is_tried_leaves_nothing(user: User, mac: Host, home: Home) -> None:
    path = plant(mac, "#!/bin/sh\ntouch ~/begun\nexec sleep 60\n")
    with keeper("--rbee-path", path, stdin=subprocess.DEVNULL) as process:
        until = time.monotonic() + 30
        while not (mac.home / "begun").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, "error" in err) == (130, False)
    assert mac.processes() == []
    assert saved(home) == []
