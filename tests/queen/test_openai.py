"""OpenAI's and Anthropic's APIs at the queen's port, with a worker on loopback behind them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import anthropic
import attrs
import httpx
import openai
import pytest
import trio

from rbee.errors import BadInputError, OwnerGoneError
from rbee.queen import openai as module
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.attempts import Attempts
from rbee.queen.jobs import Jobs
from rbee.queen.keys import Keys
from rbee.queen.limits import Limits
from rbee.queen.offer import Offer
from rbee.queen.openai import ROUTES, Passages, add_openai_routes, decode, for_worker
from rbee.queen.places import Places
from rbee.queen.tasks import add_task_routes
from rbee.web.body import LAST_CHUNK, chunk
from rbee.web.front import Front
from rbee.web.listener import open_listener
from rbee.web.poller import open_poller
from rbee.web.pump import open_pump
from rbee.web.router import App
from rbee.web.server import serve_http
from rbee.web.upstream import open_upstreams
from rbee.wire.messages import StartWorker, WorkerInfo
from tests.queen.test_jobs import FakeHives

TOKEN = "secret"
HEAD = b"HTTP/1.1 200 OK\r\n"
EVENTS = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody tells of a worker's end."""
    monkeypatch.setattr("rbee.queen.assignments.TOLD_WITHIN", 0.05)


def whole(body: Any, status: bytes = b"200 OK") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


def stream(*events: bytes, ends: bool = True) -> bytes:
    return EVENTS + b"".join(map(chunk, events)) + (LAST_CHUNK if ends else b"")


def delta(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "logprobs": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "words"}
    return b"data: " + json.dumps({**body, "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
CHAT = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "words",
    "choices": [
        {"index": 0, "finish_reason": "stop", "logprobs": None,
         "message": {"role": "assistant", "content": "hello"}}
    ],
}  # fmt: skip


@attrs.define(eq=False)
class FakeWorker:
    """A worker's port: each request gets the next answer, then the last one again.

    An answer without an end leaves the connection open, unless ``dies``.
    """

    answers: list[bytes] = attrs.field(factory=lambda: [whole(CHAT)])
    dies: bool = False
    heads: list[bytes] = attrs.field(factory=list)
    bodies: list[bytes] = attrs.field(factory=list)
    asked: trio.Event = attrs.field(factory=trio.Event)
    left: trio.Event = attrs.field(factory=trio.Event)
    url: str = ""

    async def __call__(self, connection: trio.SocketStream) -> None:
        async with connection:
            data = b""
            try:
                while part := await connection.receive_some():
                    data += part
                    head, end, body = data.partition(b"\r\n\r\n")
                    if end and len(body) == int(head.rpartition(b"content-length: ")[2]):
                        data = b""
                        await self._answer(connection, head, body)
                        if self.dies:
                            return
            except trio.BrokenResourceError:
                pass
            self.left.set()

    async def _answer(self, connection: trio.SocketStream, head: bytes, body: bytes) -> None:
        self.heads.append(head)
        self.bodies.append(body)
        self.asked.set()
        await connection.send_all(self.answers[0])
        if len(self.answers) > 1:
            self.answers.pop(0)

    def header(self, name: bytes) -> bytes | None:
        for line in self.heads[-1].split(b"\r\n")[1:]:
            key, _, value = line.partition(b": ")
            if key == name:
                return value
        return None


@attrs.define(eq=False)
class Queen:
    """What a client needs of a queen, and what is behind it."""

    hives: FakeHives
    passages: Passages
    jobs: Jobs
    url: str
    stop: trio.CancelScope

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=TOKEN, max_retries=0)

    def anthropic(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url, api_key=TOKEN, max_retries=0)

    async def streamed(self, texts: list[str | None] | None = None) -> list[str | None]:
        """Read a stream by the openai package; ``texts`` has what came also if it fails."""
        got: list[str | None] = [] if texts is None else texts

        def read() -> None:  # its asynchronous streams leave generators to the collector
            with openai.OpenAI(base_url=self.url + "/v1", api_key=TOKEN) as client:
                for part in client.chat.completions.create(**ASK, stream=True):
                    got.append(part.choices[0].delta.content)  # noqa: PERF401 - it may fail

        await trio.to_thread.run_sync(read)
        return got

    async def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        options.setdefault("json", {"model": "words"})
        headers = {"authorization": f"Bearer {TOKEN}", **options.pop("headers", {})}
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            return await client.post(path, headers=headers, **options)


@asynccontextmanager
async def open_queen(
    *workers: FakeWorker,
    limits: Limits | None = None,
    config: Path = Path("/nowhere/config.toml"),
    slots: int = 0,
) -> AsyncGenerator[Queen, None]:
    """Run the routes on a real port, with as many ready workers for the model "words"."""

    async def nobody_knows(start: StartWorker) -> None:
        await trio.lowlevel.checkpoint()

    hives = FakeHives()
    attempts = Attempts(hives.get)
    aliases = Aliases(config)
    places = Places(hives.look, attempts, nobody_knows)
    assignments = Assignments(hives, places, aliases, limits)

    async def look() -> list[Any]:
        views = await hives.look()
        return [attrs.evolve(view, workers=tuple(hives.workers)) for view in views]

    def ending() -> OwnerGoneError:
        return OwnerGoneError("the queen ended")

    listener = open_listener("127.0.0.1", 0, exact=True)
    keys = Keys(config)
    app = App(token=TOKEN, tells_overhead=True, keys=keys, gate=assignments.room.reading)
    async with (
        trio.open_nursery() as nursery,
        attempts.open(),
        open_poller() as poller,
        open_pump(poller, 30) as pump,
        open_upstreams(poller) as upstreams,
    ):
        for number, worker in enumerate(workers):
            (listening,) = await nursery.start(partial(trio.serve_tcp, worker, 0, host="127.0.0.1"))
            worker.url = f"http://127.0.0.1:{listening.socket.getsockname()[1]}"
            hives.put(f"worker-{number}", "ready", worker.url, slots=slots)
        passages = Passages(assignments, aliases, Offer(aliases, look), upstreams, ending)
        jobs = Jobs(assignments, aliases, upstreams, ending)
        add_openai_routes(app, passages)
        add_task_routes(app, jobs)
        front = Front(app, pump)
        url = await nursery.start(partial(serve_http, app, listener, grace=0.3, front=front))
        stop = trio.CancelScope()
        async with trio.open_nursery() as inner:
            opened = trio.Event()
            inner.start_soon(_keep_open, passages, jobs, stop, opened)
            await opened.wait()
            with trio.fail_after(10):
                yield Queen(hives, passages, jobs, url, stop)
            stop.cancel()
        nursery.cancel_scope.cancel()


async def _keep_open(
    passages: Passages, jobs: Jobs, stop: trio.CancelScope, opened: trio.Event
) -> None:
    with stop:
        async with passages.open(), jobs.open():
            opened.set()
            await trio.sleep_forever()


async def wait_for(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(2):
        while not is_so():  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)


ASK: dict[str, Any] = {"model": "words", "messages": [{"role": "user", "content": "hi"}]}


# passing through ------------------------------------------------------------------------------
async def test_the_openai_package_gets_an_answer() -> None:
    worker = FakeWorker()
    async with open_queen(worker) as queen, queen.openai() as client:
        answer = await client.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == "hello"
        assert json.loads(worker.bodies[0]) == ASK
        assert worker.header(b"authorization") == b"Bearer secret"  # the hive's, as it happens
        assert worker.header(b"x-rbee-worker-id") == b"worker-0"
        assert worker.header(b"host") == worker.url.removeprefix("http://").encode()
        assert worker.header(b"accept-encoding") is None


async def test_the_openai_package_gets_a_stream() -> None:
    worker = FakeWorker([stream(delta("a"), delta("b"), DONE)])
    async with open_queen(worker) as queen:
        assert await queen.streamed() == ["a", "b"]


async def test_the_anthropic_package_gets_an_answer_with_its_own_header() -> None:
    body = {
        "id": "m", "type": "message", "role": "assistant", "model": "words", "stop_reason": None,
        "stop_sequence": None, "content": [{"type": "text", "text": "hello"}],
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    worker = FakeWorker([whole(body)])
    async with open_queen(worker) as queen, queen.anthropic() as client:
        answer = await client.messages.create(**ASK, max_tokens=5)
        assert answer.content[0].text == "hello"  # type: ignore[union-attr]
        assert worker.heads[0].startswith(b"POST /v1/messages HTTP/1.1\r\n")
        assert worker.header(b"x-api-key") is None
        assert worker.header(b"anthropic-version")


@pytest.mark.parametrize("path", [*ROUTES, "/v1/messages", "/v1/messages/count_tokens"])
async def test_bytes_are_untouched_both_ways(path: str) -> None:
    """Odd spacing, odd numbers, unknown fields, keys twice: nobody reads what is not ours."""
    sent = b'{"model" : "words", "n":1.0e0, "x":{"y":[ 1,\t2]}, "z":"\\u00e9", "z":null }'
    got = b'{"a" : 1.50, "b":"\\u00e9"}\n'
    worker = FakeWorker([whole(got, b"200 OK")])
    async with open_queen(worker) as queen:
        if path == "/v1/embeddings":
            queen.hives.put("worker-0", "ready", worker.url, task="embed")
        headers = {"content-type": "application/json"}
        answer = await queen.post(path, content=sent, headers=headers, json=None)
        assert answer.content == got
        assert worker.bodies == [sent]


async def test_a_refusal_of_the_worker_is_passed_on_as_it_is() -> None:
    got = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
    worker = FakeWorker([whole(got, b"400 Bad Request")])
    async with open_queen(worker) as queen, queen.openai() as client:
        with pytest.raises(openai.BadRequestError, match="too long"):
            await client.chat.completions.create(**ASK)
        assert len(queen.hives.workers) == 1


async def test_a_request_id_goes_from_end_to_end() -> None:
    worker = FakeWorker()
    async with open_queen(worker) as queen:
        answer = await queen.post(headers={"x-request-id": "mine"})
        assert (answer.headers["x-request-id"], worker.header(b"x-request-id")) == ("mine", b"mine")
        answer = await queen.post()
        assert 0 < float(answer.headers["x-rbee-overhead-ms"]) < 1000
        made = answer.headers["x-request-id"]
        assert made.startswith("req-")
        assert worker.header(b"x-request-id") == made.encode()


async def test_a_worker_that_knows_another_name_gets_that_one() -> None:
    body = b'{"messages":[ {"content":"hi"} ],"model":"smollm2-135m"}'
    canonical = "hf:HuggingFaceTB/SmolLM2-135M-Instruct"
    info = WorkerInfo("w", canonical, "ready", served_names=("other",))
    assert json.loads(for_worker(body, "smollm2-135m", info)) == {
        **json.loads(body), "model": canonical,
    }  # fmt: skip
    assert b'[ {"content":"hi"} ]' in for_worker(body, "smollm2-135m", info)
    assert for_worker(body, "smollm2-135m", attrs.evolve(info, model="smollm2-135m")) is body


# refusals -------------------------------------------------------------------------------------
async def test_models_are_listed() -> None:
    async with open_queen(FakeWorker()) as queen, queen.openai() as client:
        assert [model.id async for model in client.models.list()] == ["words"]


async def test_an_unknown_model_is_a_404_that_lists_what_there_is() -> None:
    async with open_queen(FakeWorker()) as queen, queen.openai() as client:
        with pytest.raises(
            openai.NotFoundError, match=r"'gpt-9' does not exist; there is words"
        ) as info:
            await client.chat.completions.create(**{**ASK, "model": "gpt-9"})
        error = info.value.body
        assert isinstance(error, dict)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "; there is words\n" in str(error["message"]), error


async def test_errors_have_the_shape_that_the_client_knows() -> None:
    async with open_queen(FakeWorker()) as queen:
        async with queen.anthropic() as client:
            with pytest.raises(anthropic.NotFoundError) as told:
                await client.messages.create(**{**ASK, "model": "gpt-9"}, max_tokens=5)
            body = told.value.body
            assert isinstance(body, dict)
            assert body["type"] == "error"
            assert body["error"]["type"] == "not_found_error"
        async with openai.AsyncOpenAI(base_url=queen.url + "/v1", api_key="no") as stranger:
            with pytest.raises(openai.AuthenticationError, match="a valid token is required"):
                await stranger.chat.completions.create(**ASK)
        async with anthropic.AsyncAnthropic(base_url=queen.url, api_key="no") as other:
            with pytest.raises(anthropic.AuthenticationError):
                await other.messages.create(**ASK, max_tokens=5)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"json": {}}, 400),
        ({"json": {"model": 3}}, 400),
        ({"json": {"model": "words", "stream": "yes"}}, 400),
        ({"json": [1]}, 400),
        ({"content": b"nonsense", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b'{"model":"words"}', "headers": {"content-type": "text/plain"}}, 415),
        ({"headers": {"origin": "http://evil"}}, 403),
    ],
)
async def test_a_bad_request_never_reaches_a_worker(options: dict[str, Any], status: int) -> None:
    worker = FakeWorker()
    async with open_queen(worker) as queen:
        if "content" in options:
            options = {**options, "json": None}
        answer = await queen.post(**options)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] in ("invalid_request_error", "permission_error")
        assert not worker.asked.is_set()


async def test_a_big_request_is_read_elsewhere_and_like_any_other() -> None:
    body = json.dumps({"pad": "x" * (1 << 20), "model": "words", "stream": True}).encode()
    asked = await decode(body)
    assert (asked.model, asked.stream) == ("words", True)
    with pytest.raises(BadInputError):
        await decode(body[:-1])


# ends -----------------------------------------------------------------------------------------
async def test_a_worker_that_dies_in_the_middle_is_one_error_and_no_done() -> None:
    worker = FakeWorker([stream(delta("a"), b"data: {half", ends=False)], dies=True)
    async with open_queen(worker) as queen:
        texts: list[str | None] = []
        with pytest.raises(openai.APIError, match="worker-0 on localhost ended in the middle"):
            await queen.streamed(texts)
        assert texts == ["a"]
        raw = await queen.post(json={**ASK, "stream": True})
        assert raw.text.count("event: error\n") == 1
        assert "[DONE]" not in raw.text
        assert "half" not in raw.text


async def test_the_anthropic_package_is_told_of_a_death() -> None:
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    worker = FakeWorker([stream(ping, ends=False)], dies=True)
    async with open_queen(worker) as queen:

        def read() -> None:  # its asynchronous streams leave generators to the collector
            with anthropic.Anthropic(base_url=queen.url, api_key=TOKEN) as client:
                list(client.messages.create(**ASK, max_tokens=5, stream=True))

        with pytest.raises(anthropic.APIStatusError, match="ended in the middle"):
            await trio.to_thread.run_sync(read)


async def test_a_worker_that_dies_before_its_first_byte_is_replaced_once_by_one_that_runs() -> None:
    dead, good = FakeWorker([b""], dies=True), FakeWorker()
    async with open_queen(dead, good) as queen:
        answer = await queen.post()
        assert answer.json() == CHAT
        assert dead.asked.is_set()
        states = {info.worker_id: info.state for info in queen.hives.workers}
        assert states == {"worker-0": "stopping", "worker-1": "ready"}


async def test_a_request_that_kills_two_workers_gets_no_third() -> None:
    workers = [FakeWorker([b""], dies=True) for _ in range(3)]
    async with open_queen(*workers) as queen:
        answer = await queen.post()
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "worker_died"
        assert [worker.asked.is_set() for worker in workers] == [True, True, False]
        assert not queen.hives.hive.started


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (b"401 No", "unauthorized"),
        (b"409 No", "other_worker"),
        (b"503 No", "worker_stopping"),
        (b"429 No", "too_many_failures"),
    ],
)
async def test_a_worker_that_takes_nothing_is_passed_over(status: bytes, code: str) -> None:
    full = FakeWorker([whole({"error": {"code": code, "message": ""}}, status)])
    good = FakeWorker()
    async with open_queen(full, good) as queen:
        assert (await queen.post()).json() == CHAT
        assert full.asked.is_set()


async def test_an_overloaded_worker_is_not_evicted() -> None:
    full = FakeWorker([whole({"error": {"code": 503, "message": "full"}}, b"503 No")])
    async with open_queen(full) as queen:
        answer = await queen.post()
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "full")
        assert len(queen.hives.workers) == 1


@pytest.mark.parametrize("streams", [True, False])
async def test_a_client_that_leaves_frees_the_worker(streams: bool) -> None:
    """Before the worker has said anything, as while it reads the prompt."""
    worker = FakeWorker([b""])
    async with open_queen(worker) as queen:
        with trio.move_on_after(5) as leaving:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(queen.post, json={**ASK, "stream": streams}))
                await worker.asked.wait()
                leaving.cancel()
        with trio.fail_after(0.3):
            await worker.left.wait()
        assert len(queen.passages) == 0
        assert not queen.passages._assignments.room.slots.total()


async def test_a_client_that_leaves_while_a_worker_is_started_is_forgotten() -> None:
    async with open_queen() as queen:
        with trio.move_on_after(5) as leaving:
            async with trio.open_nursery() as nursery:
                ask = {**ASK, "model": "smollm2-135m"}
                nursery.start_soon(partial(queen.post, json=ask))
                await queen.hives.hive.asked.wait()
                leaving.cancel()
        await wait_for(lambda: not len(queen.passages))


async def test_a_worker_is_started_on_demand() -> None:
    worker = FakeWorker()
    async with open_queen(worker) as queen:
        queen.hives.workers.remove("worker-0")

        async def make_ready() -> None:
            await queen.hives.workers.wait_until(lambda: queen.hives.workers.get("worker-1"))
            (start,) = queen.hives.hive.started
            assert (start.model, start.engine) == ("smollm2-135m", "vllm")
            info = WorkerInfo(
                "worker-1", "smollm2-135m", "ready", url=worker.url, owner="queen-1", engine="vllm"
            )
            queen.hives.workers.set("worker-1", info)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_ready)
            answer = await queen.post(json={"model": "smollm2-135m"})
        assert answer.json() == CHAT


async def test_embeddings_are_not_asked_of_a_worker_that_generates() -> None:
    generates, embeds = FakeWorker(), FakeWorker([whole({"data": []})])
    async with open_queen(generates, embeds) as queen:
        queen.hives.put("worker-1", "ready", embeds.url, task="embed")
        for path, asked in [
            ("/v1/embeddings", embeds), ("/v1/completions", generates), ("/tokenize", generates),
        ]:  # fmt: skip
            before = len(asked.bodies)
            await queen.post(path)
            assert len(asked.bodies) == before + 1
        queen.hives.workers.remove("worker-0")
        await queen.post("/tokenize")
        assert len(embeds.bodies) == 2


async def test_every_open_stream_is_told_when_the_queen_stops() -> None:
    worker = FakeWorker([stream(delta("a"), ends=False)])
    waiting = FakeWorker([b""])
    async with open_queen(worker, waiting) as queen:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await queen.post(json={**ASK, "stream": True}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await worker.asked.wait()
            await waiting.asked.wait()
            await trio.sleep(0.05)
            queen.stop.cancel()
        refused, told = sorted(answers, key=lambda answer: -answer.status_code)
        assert told.text.startswith(delta("a").decode())
        assert told.text.endswith("\n\n")
        assert told.text.count("event: error\n") == 1
        assert "the queen ended" in told.text
        assert refused.status_code == 503
        assert (await queen.post()).status_code == 503


async def test_a_lost_hive_ends_its_streams() -> None:
    worker = FakeWorker([stream(delta("a"), ends=False)])
    async with open_queen(worker) as queen:

        async def lose() -> None:
            await worker.asked.wait()
            await trio.sleep(0.05)
            for scope in queen.hives.hive.relays:
                scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            answer = await queen.post(json={**ASK, "stream": True})
        assert "ended in the middle" in answer.text


async def test_a_worker_that_says_nothing_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL", 0.3)
    worker = FakeWorker([stream(delta("a"), ends=False)])
    silent = FakeWorker([b""])
    async with open_queen(worker) as queen:
        answer = await queen.post(json={**ASK, "stream": True})
        assert answer.text.count("event: error\n") == 1
        assert '"code":"stalled"' in answer.text
        with trio.fail_after(1):
            await worker.left.wait()
    async with open_queen(silent) as queen:
        answer = await queen.post(json={**ASK, "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unresponsive")


async def test_replicas_share_the_requests() -> None:
    workers = [FakeWorker([b""]) for _ in range(3)]
    async with open_queen(*workers) as queen, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(partial(queen.post, json=ASK))
        await wait_for(lambda: sum(len(worker.bodies) for worker in workers) == 6)
        assert [len(worker.bodies) for worker in workers] == [2, 2, 2]
        nursery.cancel_scope.cancel()


# too much ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [Limits(waiting=1), Limits(waiting_per_model=1)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_what_is_too_much_is_refused_in_the_apis_own_shape(limits: Limits, path: str) -> None:
    worker = FakeWorker([EVENTS])
    async with open_queen(worker, limits=limits, slots=1) as queen, trio.open_nursery() as nursery:
        for _ in range(2):  # one runs, one waits
            nursery.start_soon(partial(queen.post, json={"model": "words", "stream": True}))
        await wait_for(lambda: len(queen.passages._assignments.room) == 1)
        answer = await queen.post(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert len(worker.heads) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_body_that_would_be_one_byte_too_much_is_refused_until_there_is_room(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.queen.waiting_room.MAX_BODY", 0)
    async with open_queen(FakeWorker(), limits=Limits(waiting_size=100)) as queen:
        room = queen.passages._assignments.room
        with room.reading() as take:
            take(80)
            assert (await queen.post(path)).status_code != 429  # with 17 bytes
            take(4)
            refused = await queen.post(path)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "are being read hold 84" in refused.json()["error"]["message"]
        assert room._read_size == 0


async def test_a_key_may_use_its_models_as_often_as_it_may(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    digest = sha256(b"bees").hexdigest()
    limits = 'requests_per_minute = 1\nmodels = ["words"]'
    config.write_text(f'[keys.bee]\nsha256 = "{digest}"\n{limits}\n')
    bee = {"authorization": "Bearer bees"}
    async with open_queen(FakeWorker(), config=config) as queen:
        refused = await queen.post(json={"model": "other"}, headers=bee)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "model")
        config.write_text(config.read_text().replace("= 1", "= 2"))
        assert (await queen.post(headers=bee)).status_code == 200
        late = await queen.post(headers=bee)
        assert late.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(late.headers["retry-after"]) <= 60
        async with queen.openai() as client:  # the token has no bound
            assert (await client.chat.completions.create(**ASK)).model == "words"
