"""Errors know their codes, and travel without losing what they say."""

from __future__ import annotations

import pytest

from rbee.errors import (
    BY_CODE,
    BY_STATUS,
    BadInputError,
    ConflictError,
    MachineError,
    OwnerGoneError,
    RbeeError,
    UnavailableError,
    UsageError,
    from_wire,
    leaves,
)


def test_every_class_has_a_code_of_its_own() -> None:
    classes = {RbeeError}
    todo = [RbeeError]
    while todo:
        found = [cls for cls in todo.pop().__subclasses__() if cls.__module__ == "rbee.errors"]
        classes.update(found)
        todo += found
    assert set(BY_CODE.values()) == classes
    assert len(BY_CODE) == len(classes)


@pytest.mark.parametrize("cls", BY_CODE.values())
def test_an_error_arrives_as_it_was_sent(cls: type[RbeeError]) -> None:
    sent = cls("what", hint="do", required=5)
    got = from_wire(sent.code, sent.message, hint=sent.hint, details=sent.details)
    assert type(got) is cls
    assert (str(got), got.hint, got.details) == ("what", "do", {"required": 5})


def test_an_unknown_code_keeps_its_name_on_the_class_of_its_status() -> None:
    error = from_wire("port_taken", "m", status=409)
    assert (type(error), error.code) == (ConflictError, "port_taken")
    assert type(from_wire("x", "m", status=418)) is RbeeError
    assert from_wire("", "m", status=503).code == "unavailable"


def test_the_first_class_of_a_status_stands_for_it() -> None:
    assert BY_STATUS[400] is BadInputError
    assert BY_STATUS[500] is RbeeError
    assert BY_STATUS[503] is UnavailableError


def test_details_may_be_named_like_arguments() -> None:
    details = {"code": 1, "message": 2, "hint": 3, "self": 4}
    assert from_wire("usage", "m", details=details).details == details


def test_only_a_wrong_command_line_exits_with_2() -> None:
    assert {cls for cls in BY_CODE.values() if cls.exit_code == 2} == {UsageError}
    assert MachineError("x", code="own").exit_code == 1
    assert OwnerGoneError("x").code == "owner_gone"


def test_leaves_are_the_plain_exceptions_of_nested_groups() -> None:
    a, b, c = ValueError("a"), KeyError("b"), RbeeError("c")
    group = BaseExceptionGroup("x", [a, ExceptionGroup("y", [b, ExceptionGroup("z", [c])])])
    assert list(leaves(group)) == [a, b, c]
    assert list(leaves(a)) == [a]
