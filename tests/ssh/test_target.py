from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.errors import BadInputError
from rbee.ssh import SshTarget
from rbee.ssh.fence import Fence
from rbee.ssh.target import FORBIDDEN

SPECIAL = st.sampled_from(sorted(FORBIDDEN | {"\n", "\0", "\x1b"}))


@given(st.text(), SPECIAL, st.text())
def test_what_a_shell_would_read_is_no_host_and_no_user(a: str, special: str, b: str) -> None:
    with pytest.raises(BadInputError):
        SshTarget("mac", a + special + b)
    with pytest.raises(BadInputError):
        SshTarget("mac", "host", user=a + special + b)


@pytest.mark.parametrize("host", ["", "-oProxyCommand=id", "a b", "*"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(BadInputError, match="node mac"):
        SshTarget("mac", host)


def test_the_hint_is_a_command_that_can_be_pasted() -> None:
    target = SshTarget("mac", "fe80::1%eth0", port=2222, user="ann b", keys=(Path("/a key"),))
    assert target.command == "ssh -p 2222 -i '/a key' 'ann b@fe80::1%eth0'"
    assert target.interactive == target.command.replace("ssh", "ssh -t", 1)
    mac = SshTarget("mac", "mac")
    assert mac.running("~/bin/rbee-hive", "detect") == "ssh mac '~/bin/rbee-hive detect'"
    assert mac.running("~/my bin/x") == "ssh mac " + shlex.quote("~/'my bin/x'")


def test_a_fence_stands_from_the_last_word_until_the_guards_are_done() -> None:
    fence = Fence()
    assert fence.lifted_at == 0
    fence.note_start(3)
    fence.last_beat, fence.closed = 100.0, 99.0
    assert fence.lifted_at == 100 + 3 + 8
    fence.closed = 104.0
    assert fence.lifted_at == 104 + 3 + 8
    fence.note_end()
    assert fence.lifted_at == 0
