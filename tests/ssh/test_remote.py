from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rbee import guard
from rbee.aio import Aio, open_aio
from rbee.ssh import (
    LoginShellError,
    OutputTooLongError,
    RemoteProgramError,
    RemotePythonError,
    boot,
    open_connection,
    remote,
    run,
)
from tests.ssh.nodes import LEASE
from tests.ssh.sshd import SSHD, Sshd, open_sshd

pytestmark = pytest.mark.slow

ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['GIVEN']]))"
NASTY = st.text(
    st.one_of(st.sampled_from(list(" '\"`$(){};&|<>*?!#~\\\n\t-=%")), st.characters(
        codec="utf-8", exclude_characters="\0")), max_size=20,
)  # fmt: skip


async def test_a_program_runs_to_its_end_with_all_it_said(sshd: Sshd, aio: Aio) -> None:
    code = "import sys; sys.stdout.write('x' * 300000); sys.stderr.write('e'); sys.exit(3)"
    async with open_connection(sshd.target(), aio) as connection:
        done = await run(connection, [sys.executable, "-c", code])
    assert (done.status, len(done.stdout), done.stderr) == (3, 300000, "e")


def test_nothing_that_we_send_is_read_by_a_shell(sshd: Sshd) -> None:
    @given(st.lists(NASTY, max_size=4), NASTY)
    @settings(
        max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    def check(words: list[str], value: str) -> None:
        async def ask() -> bytes:
            async with open_aio(uvloop=False) as aio, open_connection(sshd.target(), aio) as there:
                done = await run(there, [sys.executable, "-c", ECHO, *words], env={"GIVEN": value})
                return done.stdout

        assert json.loads(trio.run(ask)) == [words, value]

    check()


async def test_the_command_that_a_shell_reads_is_constant_and_plain() -> None:
    outside, inside, end = remote.LOADER.split("'")
    assert end == ""
    assert outside == "exec python3 -I -S -c "
    assert not set(inside) & set("!$`\\\n'")


async def test_the_guard_fits_into_one_argument() -> None:
    assert len(Path(guard.__file__).read_bytes()) < 100 * 1024  # the kernel takes 128 KiB


async def test_what_says_too_much_is_ended(sshd: Sshd, aio: Aio) -> None:
    async with open_connection(sshd.target(), aio) as connection:
        with pytest.raises(OutputTooLongError, match="more than 1000 bytes"):
            await run(connection, [sys.executable, "-c", "print('x' * 200000)"], limit=1000)


async def test_cancelling_ends_the_program_on_the_node(
    sshd: Sshd, aio: Aio, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(99)"
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, connection, [sys.executable, "-c", code, str(note)])
            with trio.fail_after(10):
                while not note.exists() or not note.read_text():
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    assert not guard.start_time(int(note.read_text()))


async def test_a_program_that_is_not_there_is_named(sshd: Sshd, aio: Aio) -> None:
    async with open_connection(sshd.target(), aio) as connection:
        with pytest.raises(RemoteProgramError, match="node mac has no program no-such-program"):
            await run(connection, ["no-such-program"])


@pytest.mark.parametrize(
    ("forced", "kind", "says"),
    [
        ('echo welcome; echo -n to; eval "$SSH_ORIGINAL_COMMAND"', None, ""),
        ('sleep 60 & eval "$SSH_ORIGINAL_COMMAND"', None, ""),
        ('PATH=/nowhere; eval "$SSH_ORIGINAL_COMMAND"', RemotePythonError, "no python3"),
        ("echo This account is not available; exit 1", LoginShellError, "not available"),
        ("yes", LoginShellError, "talks without end"),
    ],
)
async def test_what_the_login_shell_does_is_survived_or_told(
    tmp_path: Path, aio: Aio, forced: str, kind: type[Exception] | None, says: str
) -> None:
    if SSHD is None:
        pytest.skip("no sshd here")
    with open_sshd(tmp_path / "sshd", f"ForceCommand {forced}") as sshd:
        async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
            with trio.fail_after(15):
                if kind is None:
                    assert (await run(connection, ["echo", "hi"])).stdout == b"hi\n"
                    return
                with pytest.raises(kind, match=says) as caught:
                    await run(connection, ["echo", "hi"])
                assert "node mac" in str(caught.value)


async def test_a_python_may_be_given_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(sys.executable)
    monkeypatch.setenv("PATH", str(python.parent))
    request = {"python": python.name, "minimum": [3, 11]}
    assert boot.find_python(request, "/")[0] == str(python)


async def test_an_old_python_is_told(sshd: Sshd, aio: Aio, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3 9 2\n")
    old.chmod(0o755)
    async with open_connection(sshd.target(), aio) as connection:
        with pytest.raises(RemotePythonError, match=r"no Python 3\.11 or newer, found: .*3\.9\.2"):
            await run(connection, ["true"], python=str(old))
