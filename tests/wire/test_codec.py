"""What arrives is exactly what its class says, or refused by the field's name."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.errors import BadInputError
from rbee.wire import codec
from rbee.wire.messages import (
    Device,
    Error,
    ErrorDetail,
    Message,
    StartWorker,
    TaskRequest,
    WorkerInfo,
)


def refusal(data: bytes | str, kind: type = TaskRequest) -> str:
    with pytest.raises(BadInputError) as info:
        codec.loads(data, kind)
    return info.value.message


def task(field: str) -> str:
    return f'{{"model": "m", {field}}}'


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (task('"modle": 1'), "extra fields found (modle) @ $"),
        (task('"messages": [{"role": "user", "content": "x", "z": 1}]'), "(z) @ $.messages[0]"),
        ('{"model": 5}', "expected str, got int @ $.model"),
        ("{}", "required field missing @ $.model"),
        (task('"max_tokens": 1.0'), "expected int, got float @ $.max_tokens"),
        (task('"max_tokens": "1"'), "expected int, got str @ $.max_tokens"),
        (task('"max_tokens": true'), "expected int, got bool @ $.max_tokens"),
        (task('"raw": 1'), "expected bool, got int @ $.raw"),
        (task('"prompt": null, "stop": "END"'), "expected a list, got str @ $.stop"),
        (task('"stop": {"a": 1}'), "expected a list, got dict @ $.stop"),
        (task('"messages": ["hello"]'), "expected an object, got str @ $.messages[0]"),
        (task('"deadline": NaN'), "expected a finite number @ $.deadline"),
        (task('"deadline": 1e999'), "expected a finite number @ $.deadline"),
        (task(f'"deadline": 1{"0" * 400}'), "@ $.deadline"),
        (task(r'"prompt": "\ud800"'), "surrogates not allowed @ $.prompt"),
        ("[]", "expected an object, got list"),
        ('"model"', "expected an object, got str"),
        ("null", "expected an object, got NoneType"),
        ("[" * 100_000, "the body is not JSON"),
        ("{", "the body is not JSON"),
        (b'"\xff"', "the body is not JSON"),
    ],
)
def test_what_is_wrong_is_refused_and_named(data: bytes | str, told: str) -> None:
    assert told in refusal(data)


def test_every_wrong_field_is_named() -> None:
    told = refusal('{"model": 1, "seed": "x", "nope": 0}')
    assert all(f"$.{name}" in told for name in ("model", "seed"))
    assert "nope" in told


def test_a_wrong_value_in_a_mapping_is_named() -> None:
    told = refusal('{"model": "m", "engine_args": {"rate": 5}}', StartWorker)
    assert "expected str, got int @ $.engine_args['rate']" in told


def test_a_list_of_objects_is_checked_as_one_object_is() -> None:
    assert "required field missing @ $[0].index" in refusal('[{"backend": "cpu"}]', list[Device])
    assert "expected a list" in refusal('{"backend": "cpu"}', list[Device])


def test_an_integer_is_a_fine_float() -> None:
    request = codec.loads(task('"temperature": 1'), TaskRequest)
    assert request.temperature == 1.0
    assert type(request.temperature) is float


def test_optional_fields_may_be_null_or_missing() -> None:
    assert codec.loads(task('"prompt": null'), TaskRequest) == TaskRequest("m")


def test_a_value_that_is_no_unicode_text_is_sent_with_a_mark_instead() -> None:
    assert codec.loads(codec.dumps(Error("x", "a\udc80b")), Error).message == "a?b"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
requests = st.builds(
    TaskRequest,
    model=texts,
    prompt=st.none() | texts,
    messages=st.none() | st.lists(st.builds(Message, texts, texts), max_size=3).map(tuple),
    temperature=st.none() | numbers,
    seed=st.none() | st.integers(),
    stop=st.lists(texts, max_size=3).map(tuple),
)


@given(requests)
def test_a_message_arrives_as_it_was_sent(request: TaskRequest) -> None:
    assert codec.loads(codec.dumps(request), TaskRequest) == request


def test_nested_objects_arrive_as_they_were_sent() -> None:
    detail = ErrorDetail(
        "insufficient", "no memory", details={"required": 5, "deep": [{"a": None}]}
    )
    info = WorkerInfo("worker-1", "m", "failed", served_names=("m", "n"), error=detail)
    assert codec.loads(codec.dumps([info]), list[WorkerInfo]) == [info]


def test_fields_are_given_one_level_deep() -> None:
    message = Message("user", "hi")
    fields = codec.fields_of(TaskRequest("m", messages=(message,)))
    assert fields["messages"] == (message,)
    assert TaskRequest(**fields) == attrs.evolve(TaskRequest("m"), messages=(message,))
