"""The port of a daemon: the one asked for, the next free one, or why there is none."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator

import pytest

from rbee.errors import BadInputError, ConflictError, MachineError
from rbee.web.holder import find_holder
from rbee.web.listener import open_listener, url_of


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_an_exact_port_that_is_taken_is_a_conflict_that_names_it(taken: int) -> None:
    with pytest.raises(ConflictError, match=f"port {taken} on 127.0.0.1 is taken") as info:
        open_listener("127.0.0.1", taken, exact=True)
    assert info.value.code == "port_taken"
    assert f":{taken}" in info.value.hint


def test_who_has_an_exact_port_is_told(taken: int) -> None:
    with pytest.raises(ConflictError, match=rf"is taken by pid {os.getpid()} \(.+\)$"):
        open_listener("127.0.0.1", taken, exact=True)


def test_a_holder_that_cannot_be_seen_is_left_out() -> None:
    assert find_holder(0) == ""


def test_a_port_that_is_not_for_this_user_is_not_told_as_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(MachineError, match=r"not allowed to listen on 127\.0\.0\.1:80") as info:
        open_listener("127.0.0.1", 80, exact=False)
    assert "--port" in info.value.hint


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_listened_on() -> None:
    with open_listener("::1", 0, exact=True) as listener:
        assert url_of(listener).startswith("http://[::1]:")


def test_the_next_free_port_is_taken_and_told(taken: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open_listener("127.0.0.1", taken, exact=False) as listener:
        port = listener.getsockname()[1]
        assert taken < port <= taken + 200
        assert f"port {taken} is taken, using {port}" in caplog.text
        with open_listener("127.0.0.1", taken, exact=False) as third:
            assert third.getsockname()[1] > port


def test_port_0_is_any_free_port() -> None:
    with (
        open_listener("127.0.0.1", 0, exact=True) as one,
        open_listener("127.0.0.1", 0, exact=True) as two,
    ):
        assert url_of(one) != url_of(two)
        assert url_of(one) == f"http://127.0.0.1:{one.getsockname()[1]}"


def test_all_ports_in_reach_taken_is_a_conflict(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.web.listener.NEXT_PORTS", 0)
    with pytest.raises(ConflictError, match=f"all up to {taken}"):
        open_listener("127.0.0.1", taken, exact=False)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(MachineError, match=r"cannot listen on 192\.0\.2\.1:80"):
        open_listener("192.0.2.1", 80, exact=False)


def test_no_address_is_not_every_address() -> None:
    with pytest.raises(BadInputError, match="the address to listen on is empty"):
        open_listener("", 0, exact=True)


@pytest.mark.parametrize("port", [-1, 65536])
@pytest.mark.parametrize("exact", [True, False])
def test_a_port_that_cannot_be_is_bad_input(port: int, exact: bool) -> None:
    with pytest.raises(BadInputError, match=f"port {port} is not between"):
        open_listener("127.0.0.1", port, exact=exact)
