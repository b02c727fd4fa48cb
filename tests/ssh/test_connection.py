from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from rbee.aio import Aio, open_aio
from rbee.errors import RbeeError
from rbee.guard import children
from rbee.ssh import (
    ChangedHostKeyError,
    ConnectionLostError,
    SshAuthError,
    SshConfigError,
    SshError,
    SshKeyError,
    SshTarget,
    TransferError,
    UnknownHostKeyError,
    UnreachableError,
    accept_host_key,
    open_connection,
    run,
)
from rbee.ssh.connection import Connection
from rbee.ssh.fence import Fence
from tests.ssh.nodes import LEASE, gone
from tests.ssh.sshd import Sshd, keygen

pytestmark = pytest.mark.slow


async def says(target: SshTarget, aio: Aio) -> bytes:
    async with open_connection(target, aio) as connection:
        return (await run(connection, ["echo", "hi"])).stdout


async def refused(target: SshTarget, aio: Aio, kind: type[RbeeError]) -> RbeeError:
    with pytest.raises(kind) as caught:
        async with open_connection(target, aio):
            pytest.fail("we were let in")
    assert "node mac" in caught.value.message
    assert caught.value.hint
    assert caught.value.details["node"] == "mac"
    return caught.value


# host keys -------------------------------------------------------------------------------------
async def test_an_unknown_key_is_shown_and_can_be_accepted(
    sshd: Sshd, aio: Aio, tmp_path: Path
) -> None:
    target = sshd.target(known_hosts=tmp_path / "new" / "known_hosts")
    error = await refused(target, aio, UnknownHostKeyError)
    assert isinstance(error, UnknownHostKeyError)
    shown = subprocess.check_output(["ssh-keygen", "-lf", str(sshd.directory / "host.pub")])
    assert error.key.fingerprint == shown.decode().split()[1]
    assert error.key.fingerprint in error.message
    assert target.known_hosts
    accept_host_key(target.known_hosts, error.key)
    assert await says(target, aio) == b"hi\n"


async def test_an_unended_last_line_is_not_joined(sshd: Sshd, tmp_path: Path, aio: Aio) -> None:
    known = tmp_path / "known_hosts"
    known.write_text("other ssh-ed25519 AAAA")
    error = await refused(sshd.target(known_hosts=known), aio, UnknownHostKeyError)
    assert isinstance(error, UnknownHostKeyError)
    accept_host_key(known, error.key)
    assert known.read_text().splitlines() == ["other ssh-ed25519 AAAA", error.key.line]


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
async def test_a_changed_key_is_refused(sshd: Sshd, aio: Aio, tmp_path: Path, kind: str) -> None:
    keygen(tmp_path / "other", kind=kind)
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{sshd.port} {(tmp_path / 'other.pub').read_text()}")
    error = await refused(sshd.target(known_hosts=known), aio, ChangedHostKeyError)
    assert f"[127.0.0.1]:{sshd.port}" in error.hint


async def test_hashed_known_hosts_are_read(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(sshd.known_hosts.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert b"127.0.0.1" not in known.read_bytes()
    assert await says(sshd.target(known_hosts=known), aio) == b"hi\n"


async def test_each_kind_of_known_hosts_file_has_its_default(
    sshd: Sshd, aio: Aio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config, known = tmp_path / "config", tmp_path / ".ssh" / "known_hosts"
    target = sshd.target(known_hosts=None, config=config)
    config.write_text(f"UserKnownHostsFile ~/mine {tmp_path}/too\nGlobalKnownHostsFile none\n")
    error = await refused(target, aio, UnknownHostKeyError)
    assert isinstance(error, UnknownHostKeyError)
    assert error.file == tmp_path / "mine"
    config.write_text("GlobalKnownHostsFile /dev/null\n")
    error = await refused(target, aio, UnknownHostKeyError)
    assert isinstance(error, UnknownHostKeyError)
    assert error.file == known
    accept_host_key(error.file, error.key)
    assert await says(target, aio) == b"hi\n"


# keys ------------------------------------------------------------------------------------------
async def test_a_wrong_key_is_tried_once(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    keygen(tmp_path / "wrong")
    error = await refused(sshd.target(keys=(tmp_path / "wrong",)), aio, SshAuthError)
    assert str(tmp_path / "wrong") in error.message


async def test_an_encrypted_key_needs_the_agent(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    keygen(tmp_path / "secret", passphrase="open sesame")
    authorized = sshd.directory / "authorized"
    authorized.write_text(authorized.read_text() + (tmp_path / "secret.pub").read_text())
    error = await refused(sshd.target(keys=(tmp_path / "secret",)), aio, SshKeyError)
    assert error.hint == f"ssh-add {tmp_path / 'secret'}"
    agent = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL)
    try:
        with trio.fail_after(5):
            while not agent.exists():
                await trio.sleep(0.01)
        _add_to_agent(agent, tmp_path)
        assert await says(sshd.target(keys=(), agent=str(agent)), aio) == b"hi\n"
        assert (
            await says(sshd.target(keys=(tmp_path / "secret",), agent=str(agent)), aio) == b"hi\n"
        )
    finally:
        process.kill()
        process.wait()


def _add_to_agent(agent: Path, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    answer.write_text("#!/bin/sh\necho open sesame\n")
    answer.chmod(0o700)
    subprocess.run(
        ["ssh-add", "-q", str(tmp_path / "secret")], check=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "SSH_AUTH_SOCK": str(agent), "SSH_ASKPASS": str(answer),
             "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"},
    )  # fmt: skip


async def test_a_missing_key_and_one_for_all_to_read_are_refused_at_home(
    sshd: Sshd, aio: Aio, tmp_path: Path
) -> None:
    await refused(sshd.target(keys=(tmp_path / "none",)), aio, SshKeyError)
    keygen(tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    error = await refused(sshd.target(keys=(tmp_path / "open",)), aio, SshKeyError)
    assert error.hint == f"chmod 600 {tmp_path / 'open'}"


# the way ---------------------------------------------------------------------------------------
async def test_refused_and_nameless_are_told_apart(sshd: Sshd, aio: Aio) -> None:
    error = await refused(sshd.target(port=1), aio, UnreachableError)
    assert "refused" in error.message.lower()
    error = await refused(sshd.target(host="no-such-host.invalid"), aio, UnreachableError)
    assert "no address" in error.message


async def test_who_does_not_answer_is_tried_three_times(sshd: Sshd, aio: Aio) -> None:
    came: list[float] = []

    async def hang_up(stream: trio.SocketStream) -> None:
        came.append(trio.current_time())
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        serving = await nursery.start(trio.serve_tcp, hang_up, 0)
        port = serving[0].socket.getsockname()[1]
        await refused(sshd.target(port=port), aio, UnreachableError)
        nursery.cancel_scope.cancel()
    first, second, third = came
    assert 0.2 <= second - first < 0.4 <= third - second < 1.0


async def test_a_silent_port_ends_in_its_limit(sshd: Sshd, aio: Aio) -> None:
    async def say_nothing(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        serving = await nursery.start(trio.serve_tcp, say_nothing, 0)
        port = serving[0].socket.getsockname()[1]
        with trio.fail_after(5):
            error = await refused(sshd.target(port=port, connect_limit=0.3), aio, UnreachableError)
        assert "within 0.3 s" in error.message
        nursery.cancel_scope.cancel()


async def test_no_ssh_server_is_told(sshd: Sshd, aio: Aio) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 no\r\n\r\n")

    async with trio.open_nursery() as nursery:
        serving = await nursery.start(trio.serve_tcp, hang_up, 0)
        port = serving[0].socket.getsockname()[1]
        error = await refused(sshd.target(port=port), aio, RbeeError)
        assert "node mac" in error.message
        nursery.cancel_scope.cancel()


async def test_the_ssh_config_names_all(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    (tmp_path / "included").write_text(
        f"Host node\n  HostName 127.0.0.1\n  Port {sshd.port}\n  IdentityFile {sshd.key}\n"
    )
    (tmp_path / "config").write_text(
        f"Include {tmp_path}/included\nMatch host 127.0.0.1\n  User {user}\n"
        f"Host *\n  UserKnownHostsFile {sshd.known_hosts}\n"
    )
    assert await says(SshTarget("mac", "node", config=tmp_path / "config", agent=""), aio) == (
        b"hi\n"
    )
    jump = tmp_path / "jump"
    jump.write_text(
        (tmp_path / "config").read_text() + "Host far\n  HostName 127.0.0.1\n"
        f"  Port {sshd.port}\n  IdentityFile {sshd.key}\n  ProxyJump {user}@node\n"
    )
    assert await says(SshTarget("mac", "far", config=jump, agent=""), aio) == b"hi\n"


async def test_a_bad_ssh_config_is_named(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Port many\n")
    target = sshd.target(config=tmp_path / "config", port=None)
    error = await refused(target, aio, SshConfigError)
    assert "many" in error.message
    (tmp_path / "loop").write_text("Host a b\n  ProxyJump b\n")
    await refused(SshTarget("mac", "a", config=tmp_path / "loop"), aio, SshConfigError)
    for line in ("Include ~nosuch/x", "Include /", "Include **x", "UserKnownHostsFile ~nosuch/x"):
        (tmp_path / "config").write_text(f"{line}\n")
        error = await refused(SshTarget("mac", "a", config=target.config), aio, SshConfigError)
        assert error.message.startswith("node mac: the SSH configuration cannot be used")


# files and forwards ----------------------------------------------------------------------------
async def test_files_go_there_and_back_with_progress(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    source, there, back = tmp_path / "a", tmp_path / "b c", tmp_path / "d"
    source.write_bytes(os.urandom(3 << 20))
    told: list[tuple[int, int]] = []
    async with open_connection(sshd.target(), aio) as connection:
        await connection.put(source, str(there), progress=lambda *at: told.append(at))
        await connection.get(str(there), back)
        with pytest.raises(TransferError, match="node mac"):
            await connection.put(source, "/no/such/directory/x")
    assert back.read_bytes() == source.read_bytes()
    assert told[-1] == (3 << 20, 3 << 20)


async def test_the_rest_of_a_file_goes_behind_what_is_there(
    sshd: Sshd, aio: Aio, tmp_path: Path
) -> None:
    source, there = tmp_path / "a", tmp_path / "b c"
    source.write_bytes(b"a whole file")
    there.write_bytes(b"A WHOLE")
    told: list[tuple[int, int]] = []
    async with open_connection(sshd.target(), aio) as connection:
        await connection.put_rest(source, str(there), 7, progress=lambda *at: told.append(at))
        with pytest.raises(TransferError, match="node mac"):
            await connection.put_rest(source, "/no/such/directory/x", 0)
    assert there.read_bytes() == b"A WHOLE file"
    assert told == [(12, 12)]


async def test_forwards_lead_there_and_back(sshd: Sshd, aio: Aio) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")

    async with trio.open_nursery() as nursery:
        serving = await nursery.start(trio.serve_tcp, greet, 0)
        port = serving[0].socket.getsockname()[1]
        async with open_connection(sshd.target(), aio) as connection:
            async with connection.open_forward("127.0.0.1", port) as near:
                assert await _ask(near) == b"hello"
            async with connection.open_reverse_forward("127.0.0.1", port) as far:
                assert await _ask(far) == b"hello"
        nursery.cancel_scope.cancel()


async def _ask(port: int) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        return bytes(await stream.receive_some(100))


# leaving ---------------------------------------------------------------------------------------
async def test_cancelling_anywhere_leaves_nothing(sshd: Sshd) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for step in range(0, 40, 2):
        async with open_aio(uvloop=False) as aio:
            with trio.move_on_after(step / 100):
                async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
                    await run(connection, ["sleep", "99"])
            tasks: list[int] = []

            async def count(tasks: list[int] = tasks) -> None:
                tasks.append(len(asyncio.all_tasks()))

            await aio.call(count)
            assert tasks == [2]  # its main, and this one
        assert set(os.listdir("/proc/self/fd")) == before
    await gone(*children(sshd.process.pid), within=5)


async def test_a_lost_connection_still_tells_where_it_led_and_forwards_nothing(
    sshd: Sshd, aio: Aio
) -> None:
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        sshd.kill_sessions()
        with trio.fail_after(10):
            await connection.wait_lost()
        assert connection.address == "127.0.0.1"
        with pytest.raises(SshError):
            async with connection.open_forward("127.0.0.1", 9):
                pytest.fail("it is lost")


@pytest.mark.parametrize(
    ("is_closed", "kind"), [(True, ConnectionLostError), (False, ConnectionResetError)]
)
async def test_the_sockets_own_error_means_that_the_connection_is_lost(
    sshd: Sshd, aio: Aio, is_closed: bool, kind: type[Exception]
) -> None:
    """Asyncssh gives it to whoever waits for an answer when the connection is reset."""

    async def reset() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    line: Any = SimpleNamespace(last=SimpleNamespace(is_closed=lambda: is_closed))
    connection = Connection(sshd.target(), 3.0, aio, line, Fence())
    with pytest.raises(kind):
        await connection._call(reset)
