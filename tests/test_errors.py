"""Errors know their codes, and travel without losing what they say."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, TypeGuard

import pytest

import rbee
from rbee import errors
from rbee.errors import (
    BY_CODE,
    BY_STATUS,
    CLOSER,
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
    assert {cls.code for cls in classes} == set(BY_CODE) - finer()
    assert {BY_CODE[cls.code] for cls in classes} == classes


def finer() -> set[str]:
    return {code for codes in CLOSER.values() for code in codes.split()}


def test_every_code_that_the_program_sends_is_known() -> None:
    """Where one code goes with two classes, the status decides: those are not in the table."""
    sent: dict[str, set[str]] = {}
    for path in Path(rbee.__path__[0]).rglob("*.py"):
        for call in filter(is_error, ast.walk(ast.parse(path.read_text()))):
            for code in code_of(call):
                sent.setdefault(code, set()).add(call.func.id)
    of_one = {code: names.pop() for code, names in sent.items() if len(names) == 1}
    assert len(of_one) > 70
    assert {code: BY_CODE[code].__name__ for code in of_one} == of_one


def is_error(node: ast.AST) -> TypeGuard[Any]:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and isinstance(getattr(errors, node.func.id, None), type)
    )


def code_of(call: Any) -> list[str]:
    given = [word.value for word in call.keywords if word.arg == "code"]
    return [value.value for value in given if isinstance(value, ast.Constant)]


@pytest.mark.parametrize("cls", dict.fromkeys(BY_CODE.values()))
def test_an_error_arrives_as_it_was_sent(cls: type[RbeeError]) -> None:
    sent = cls("what", hint="do", required=5)
    got = from_wire(sent.code, sent.message, hint=sent.hint, details=sent.details)
    assert type(got) is cls
    assert (str(got), got.hint, got.details) == ("what", "do", {"required": 5})


def test_an_unknown_code_keeps_its_name_on_the_class_of_its_status() -> None:
    error = from_wire("stopping", "m", status=409)
    assert (type(error), error.code) == (ConflictError, "stopping")
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
