"""Throw-away hosts: that they are like machines of their own, and that nothing is left of them.

The tests run with what the machine offers: as root each host has a network of its own, else it is
an sshd on loopback. As root this file also runs once more as an ordinary user, on such a host.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from rbee.errors import BadInputError, MachineError
from rbee.testing import namespaces
from rbee.testing.host import Host
from rbee.testing.hosts import Hosts, open_hosts, open_hosts_sync, why_no_hosts
from rbee.testing.processes import LeakError, identify, is_running
from rbee.testing.sshd import Login, Place, hashed_known_hosts, known_hosts, write_sshd_config

ROOT = Path(__file__).parents[2]
SOON = 5.0
QUIET = 0.4
STRAY = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        os.execve("/bin/sleep", ["sleep", "61"], {})
"""
needs_hosts = pytest.mark.skipif(bool(why_no_hosts()), reason=why_no_hosts() or "-")


@pytest.fixture(scope="module")
def shared() -> Iterator[Hosts]:
    with open_hosts_sync("mac", "linux", environment={"MARK": "two words"}) as hosts:
        yield hosts


@pytest.fixture
def hosts(shared: Hosts) -> Iterator[Hosts]:
    """The hosts as the tests before have found them: whole, listening, empty."""
    yield shared
    for host in shared.values():
        if host.can_partition:
            host.impair()
            host.heal()
        host.start_sshd()
        host.kill_sessions()
        for process in host.processes():
            process.signal()


@pytest.fixture
def cuttable(hosts: Hosts) -> Hosts:
    if why := hosts["mac"].why_no_partition:
        pytest.skip(f"no partitions: {why}")
    return hosts


def ssh(hosts: Hosts, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
    argv = hosts.ssh(name, *command)
    return subprocess.run(
        [*argv[:-len(command) - 1], *options, *argv[-len(command) - 1 :]],
        check=True, text=True, stdin=subprocess.DEVNULL, capture_output=True,
    ).stdout  # fmt: skip


def wait_for(happened: Callable[[], object]) -> None:
    until = time.monotonic() + SOON
    while not happened():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.01)


class Session:
    """An open ``ssh`` with a command on the other side."""

    def __init__(self, hosts: Hosts, name: str, command: str) -> None:
        self.popen = subprocess.Popen(
            hosts.ssh(name, command), bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.popen.stdin.write(text.encode() + b"\n")

    def hears(self, within: float) -> bytes | None:
        """Return what comes, b"" for the end, None when nothing comes."""
        ready = select.select([self.popen.stdout], [], [], within)[0]
        return os.read(self.popen.stdout.fileno(), 4096) if ready else None


@contextmanager
def session(hosts: Hosts, name: str, command: str) -> Iterator[Session]:
    opened = Session(hosts, name, f"echo ready; {command}")
    try:
        assert opened.hears(SOON) == b"ready\n"
        yield opened
    finally:
        opened.popen.kill()
        opened.popen.stdin.close()
        opened.popen.stdout.close()
        opened.popen.wait()


# files ------------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "host_key.pub").write_text("ssh-ed25519 AAAA rbee\n")
    return Place("mac", "10.1.2.3", 2222, tmp_path)


def test_a_known_hosts_line_has_the_port_unless_it_is_the_usual_one(place):
    usual = Place(place.name, place.address, 22, place.directory)

    assert known_hosts(place) == "[mac]:2222,[10.1.2.3]:2222 ssh-ed25519 AAAA\n"
    assert known_hosts(usual) == "mac,10.1.2.3 ssh-ed25519 AAAA\n"


def test_a_hashed_line_tells_no_name_and_is_never_the_same(place):
    lines = hashed_known_hosts(place)

    assert len(lines.splitlines()) == 2
    assert "mac" not in lines
    assert lines != hashed_known_hosts(place)


@needs_hosts
def test_sshd_reads_nothing_of_the_machines_own_configuration(place, tmp_path):
    login = Login("node", 1, 1, tmp_path, {"A": "b c", "D": "e"})

    text = write_sshd_config(place, login, "ssh-ed25519 AAAA").read_text()

    assert 'SetEnv "A=b c" "D=e"' in text.splitlines()
    assert "/etc" not in text


@pytest.mark.parametrize("names", [(), ("Mac",), ("mac", "mac"), ("a/b",), ("-a",)])
@needs_hosts
def test_bad_names_are_refused(names):
    with pytest.raises(BadInputError), open_hosts_sync(*names):
        pass


@needs_hosts
def test_an_environment_that_sshd_cannot_set_is_refused():
    opening = open_hosts_sync("mac", environment={"A": 'a"b'})
    with pytest.raises(BadInputError, match="sshd cannot set A"), opening:
        pass


# a host is a machine ----------------------------------------------------------------------------
@pytest.mark.slow
@needs_hosts
class TestHosts:
    def test_ssh_logs_in_by_name_as_the_hosts_user(self, hosts):
        told = ssh(hosts, "mac", "id -un; echo $MARK; echo ~")

        mac = hosts["mac"]
        assert told.splitlines() == [mac.user, "two words", str(mac.home)]

    def test_each_host_has_an_address_and_a_key_of_its_own(self, hosts):
        told = {ssh(hosts, name, "echo $SSH_CONNECTION").split()[2] for name in hosts}

        assert told == {host.address for host in hosts.values()}
        keys = {host.known_hosts.split()[-1] for host in hosts.values()}
        assert len(keys) == len(hosts) == 2

    def test_hashed_known_hosts_are_as_good(self, hosts):
        options = ("-o", f"UserKnownHostsFile={hosts.hashed_known_hosts}")

        assert ssh(hosts, "mac", "echo ok", options=options) == "ok\n"

    def test_another_hosts_key_is_refused(self, hosts, tmp_path):
        mac, linux = hosts["mac"], hosts["linux"]
        wrong = tmp_path / "known_hosts"
        wrong.write_text(
            f"{mac.known_hosts.split()[0]} {' '.join(linux.known_hosts.split()[1:])}\n"
        )

        with pytest.raises(subprocess.CalledProcessError) as caught:
            ssh(hosts, "mac", "true", options=("-o", f"UserKnownHostsFile={wrong}"))

        assert "HOST IDENTIFICATION HAS CHANGED" in caught.value.stderr

    def test_one_host_is_a_jump_to_the_other(self, hosts):
        jump = f"ProxyCommand=ssh -F {hosts.ssh_config} -W %h:%p mac"

        told = ssh(hosts, "linux", "echo $SSH_CONNECTION", options=("-o", jump)).split()

        if hosts["mac"].can_partition:
            assert told[0] == hosts["mac"].address
        assert told[2] == hosts["linux"].address

    def test_a_host_reaches_whoever_opened_it(self, hosts):
        with socket.create_server((hosts.address, 0)) as listener:
            port = listener.getsockname()[1]
            reach = f"import socket; socket.create_connection(('{hosts.address}', {port})).close()"
            hosts["mac"].run([sys.executable, "-c", reach])

    def test_files_are_copied(self, hosts, tmp_path):
        (tmp_path / "here").write_text("x" * 100_000)
        target = hosts["mac"].home / "there"
        argv = ["scp", "-q", "-F", hosts.ssh_config, tmp_path / "here", f"mac:{target}"]

        subprocess.run(argv, check=True)

        assert target.read_text() == "x" * 100_000

    def test_run_is_the_hosts_user_without_ssh(self, hosts):
        mac = hosts["mac"]

        told = mac.run(["sh", "-c", "id -u; pwd; echo $HOME $MARK"]).stdout.splitlines()

        assert told == [str(mac.uid), str(mac.home), f"{mac.home} two words"]
        with pytest.raises(subprocess.CalledProcessError):
            mac.run(["false"])

    # processes ----------------------------------------------------------------------------------
    def test_a_process_is_listed_on_its_host_only(self, hosts):
        with session(hosts, "mac", "exec sleep 60"):
            # What says that it is ready is the shell, which becomes the program after that.
            wait_for(lambda: [p.title for p in hosts["mac"].processes()] == ["sleep 60"])
            assert hosts["linux"].processes() == []

    def test_what_left_its_session_and_environment_is_listed(self, hosts):
        mac = hosts["mac"]
        (mac.home / "stray.py").write_text(STRAY)

        ssh(hosts, "mac", f"{sys.executable} {mac.home}/stray.py")

        wait_for(lambda: [p.title for p in mac.processes()] == ["sleep 61"])
        stray = next(p for p in mac.processes() if p.title == "sleep 61")
        assert stray.signal()
        wait_for(lambda: not mac.processes())

    def test_sshd_is_listed_when_asked_for(self, hosts):
        mac = hosts["mac"]

        (listener,) = mac.processes(sshd=True)

        assert "sshd" in listener.title
        assert mac.processes() == []

    async def test_a_host_that_does_not_get_empty_is_an_error(self, hosts):
        mac = hosts["mac"]
        with session(hosts, "mac", "exec sleep 60"):
            with pytest.raises(LeakError, match=r"sleep 60 \(on mac\)"):
                await mac.wait_empty(0.1)
            mac.processes()[0].signal()
            assert await mac.wait_empty(SOON) < SOON

    # sshd ---------------------------------------------------------------------------------------
    def test_killing_sessions_ends_the_connections_of_that_host_only(self, hosts):
        with session(hosts, "mac", "cat") as mac, session(hosts, "linux", "cat") as linux:
            assert hosts["mac"].kill_sessions() >= 1

            assert mac.hears(SOON) == b""
            linux.say("still here")
            assert linux.hears(SOON) == b"still here\n"
            assert ssh(hosts, "mac", "echo again") == "again\n"

    def test_without_its_listener_a_host_refuses_while_connections_go_on(self, hosts):
        mac = hosts["mac"]
        with session(hosts, "mac", "cat") as opened:
            mac.stop_sshd()

            assert not mac.listens()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((mac.address, mac.port), SOON)
            opened.say("still here")
            assert opened.hears(SOON) == b"still here\n"
            assert mac.kill_sessions() >= 1
            assert opened.hears(SOON) == b""

        mac.start_sshd()
        assert ssh(hosts, "mac", "echo again") == "again\n"

    # network ------------------------------------------------------------------------------------
    def test_without_a_network_of_its_own_a_host_says_why_it_cannot_be_cut_off(self, hosts):
        mac = hosts["mac"]
        if mac.can_partition:
            pytest.skip("these hosts can be cut off")

        with pytest.raises(MachineError, match=re.escape(mac.why_no_partition)):
            mac.partition()

    def test_a_partition_is_silent_and_ends_when_it_is_healed(self, cuttable):
        mac = cuttable["mac"]
        with session(cuttable, "mac", "cat") as opened:
            mac.partition()
            opened.say("hello")

            assert opened.hears(QUIET) is None
            with pytest.raises(TimeoutError):
                socket.create_connection((mac.address, mac.port), QUIET)

            mac.heal()
            assert opened.hears(SOON) == b"hello\n"
            socket.create_connection((mac.address, mac.port), SOON).close()

    def test_a_partition_leaves_the_other_hosts_alone(self, cuttable):
        cuttable["mac"].partition()

        assert ssh(cuttable, "linux", "echo ok") == "ok\n"

    def test_a_host_that_hears_nothing_is_still_heard(self, cuttable):
        mac = cuttable["mac"]
        heard, told = mac.home / "heard", mac.home / "told"
        told.touch()
        with session(cuttable, "mac", f"tail -f {told} & exec cat > {heard}") as opened:
            wait_for(heard.exists)  # the shell there has begun
            mac.partition("to")

            opened.say("hello")
            told.write_text("news\n")
            assert opened.hears(SOON) == b"news\n"
            assert heard.read_text() == ""

    def test_a_host_that_is_not_heard_still_hears(self, cuttable):
        mac = cuttable["mac"]
        heard, told = mac.home / "heard-2", mac.home / "told-2"
        told.touch()
        with session(cuttable, "mac", f"tail -f {told} & exec cat > {heard}") as opened:
            wait_for(heard.exists)  # the shell there has begun
            mac.partition("from")

            opened.say("hello")
            told.write_text("news\n")
            wait_for(lambda: heard.read_text() == "hello\n")
            assert opened.hears(QUIET) is None

    def test_a_bad_network_is_slow(self, cuttable):
        mac = cuttable["mac"]
        mac.impair(delay=0.1)

        start = time.monotonic()
        socket.create_connection((mac.address, mac.port), SOON).close()

        assert time.monotonic() - start >= 0.2
        mac.impair()
        start = time.monotonic()
        socket.create_connection((mac.address, mac.port), SOON).close()
        assert time.monotonic() - start < 0.2

    def test_a_bad_network_loses_some_and_what_must_arrive_arrives(self, cuttable):
        mac, size = cuttable["mac"], 30_000
        mac.impair(loss=0.1)  # at 0.3, TCP waits for minutes now and then
        assert len(ssh(cuttable, "mac", f"head -c {size} /dev/zero | tr '\\0' x")) == size
        mac.impair(loss=1.0)
        with pytest.raises(TimeoutError):
            socket.create_connection((mac.address, mac.port), 0.5)

    # users --------------------------------------------------------------------------------------
    def test_the_user_is_unknown_to_the_machine(self, cuttable):
        mac = cuttable["mac"]

        assert str(mac.uid) not in Path("/etc/passwd").read_text()
        assert ssh(cuttable, "mac", "hostname") == "mac\n"

    def test_root_can_log_in_where_the_user_is_another(self, cuttable):
        assert ssh(cuttable, "mac", "id -un", options=("-l", "root")) == "root\n"

    def test_hosts_opened_twice_do_not_meet(self, hosts):
        with open_hosts_sync("mac") as others:
            assert others["mac"].address not in {host.address for host in hosts.values()}
            with session(others, "mac", "exec sleep 60"):
                assert hosts["mac"].processes() == []
                assert len(others["mac"].processes()) == 1

        assert ssh(hosts, "mac", "echo ok") == "ok\n"

    def test_what_is_readable_is_so_behind_a_locked_directory(self, tmp_path):
        for name in ("shown", "hidden"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        tmp_path.chmod(0o700)
        with open_hosts_sync("mac", readable=[tmp_path / "shown"]) as hosts:
            mac = hosts["mac"]

            assert mac.run(["cat", tmp_path / "shown" / "file"]).stdout == "shown"
            if mac.can_partition:
                assert mac.run(["cat", tmp_path / "hidden" / "file"], check=False).stdout == ""


# the end of hosts -------------------------------------------------------------------------------
HOLD = """
import json, sys, time
from rbee.testing.hosts import open_hosts_sync
with open_hosts_sync("mac") as hosts:
    mac = hosts["mac"]
    print(json.dumps([str(hosts.directory), hosts.address, mac.network, mac.uid]), flush=True)
    print(json.dumps(hosts.ssh("mac", "setsid sleep 62 >/dev/null 2>&1 </dev/null & echo")),
          json.dumps(mac.argv("sleep", "63")), sep="\\n", flush=True)
    time.sleep(60)
"""


def is_gone(directory: Path, address: str, network: int) -> bool:
    found = namespaces.members(network) if network else []
    return not directory.exists() and not found and not (network and has_address(address))


def has_address(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def everything_of(hosts: Hosts) -> list[int]:
    listed = [p.pid for host in hosts.values() for p in host.processes(sshd=True)]
    return [*listed, *(host.init.pid for host in hosts.values())]


@pytest.mark.slow
@needs_hosts
class TestTheEnd:
    async def test_leaving_ends_all_and_leaves_no_file_or_interface(self):
        async with open_hosts("mac", "linux") as hosts:
            mac: Host = hosts["mac"]
            ssh(hosts, "mac", "setsid sleep 62 >/dev/null 2>&1 </dev/null &")
            left = await trio.lowlevel.open_process(mac.argv("sleep", "63"))
            pids = [identify(pid) for pid in everything_of(hosts)]
            assert has_address(hosts.address)

        if mac.network:
            assert await left.wait() == -signal.SIGKILL
        else:
            left.kill()
            await left.wait()
        assert not [identity for identity in pids if identity and is_running(identity)]
        assert is_gone(hosts.directory, hosts.address, mac.network)

    async def test_cancelling_while_they_come_up_leaves_nothing(self):
        before = set(Path("/tmp").glob("rbee-hosts-*"))

        with trio.move_on_after(0.05) as scope:
            async with open_hosts("mac"):
                await trio.sleep_forever()

        assert scope.cancelled_caught
        assert set(Path("/tmp").glob("rbee-hosts-*")) <= before

    def test_an_error_of_the_body_passes(self):
        with pytest.raises(KeyError, match="mine"), open_hosts_sync("mac"):
            raise KeyError("mine")

    def test_nothing_is_left_of_the_hosts_of_one_who_was_killed(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        owner = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=environment
        )
        assert owner.stdout is not None
        directory, address, network, uid = json.loads(owner.stdout.readline())
        subprocess.run(json.loads(owner.stdout.readline()), check=True, stdout=subprocess.DEVNULL)
        other = json.loads(owner.stdout.readline())
        stray = subprocess.Popen(other) if network else None
        if stray is not None:
            wait_for(lambda: b"nsenter" not in Path(f"/proc/{stray.pid}/cmdline").read_bytes())
        assert Path(directory).exists()
        if network:
            Path("/tmp", f"rbee-{uid}-left").mkdir()

        owner.kill()

        owner.wait()
        owner.stdout.close()
        wait_for(lambda: is_gone(Path(directory), address, network))
        if network:
            assert not list(Path("/tmp").glob(f"rbee-{uid}-*"))
        if stray is not None:
            assert stray.wait() == -signal.SIGKILL

    @pytest.mark.skipif(os.geteuid() != 0, reason="this is an ordinary user's run")
    def test_an_ordinary_user_has_hosts_on_loopback(self):
        """Run this file once more, as a user of a host."""
        environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        with open_hosts_sync("mac", environment=environment, readable=[ROOT]) as hosts:
            mac = hosts["mac"]
            if why := mac.why_no_partition:
                pytest.skip(f"no user to run as: {why}")
            done = mac.run(
                [
                    sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                    f"--rootdir={ROOT}", f"--basetemp={mac.home}/tmp", f"-c{ROOT}/pyproject.toml",
                    Path(__file__),
                ],
                check=False,
            )  # fmt: skip

        assert done.returncode == 0, done.stdout
        assert "SKIPPED" in done.stdout
        assert "no partitions: network namespaces need root" in done.stdout
        assert " passed" in done.stdout
