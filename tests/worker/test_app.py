"""The worker's routes over real HTTP, on the echo engine."""

import json

import httpx
import pytest
import trio

from rbee.web.client import open_client

from .conftest import TOKEN


def names(events):
    return [name for name, _ in events]


def fields(events, name):
    return [json.loads(data) for kind, data in events if kind == name]


async def running(worker):
    return (await worker.client.get("/metrics")).text


async def test_execute_streams_started_tokens_and_one_end(open_worker):
    async with open_worker(rate="1000") as worker, worker.stream(max_tokens=5) as stream:
        events = [event async for event in stream]
        assert stream.headers["x-rbee-job-id"] == "job-1"
    assert names(events) == ["started", *["token"] * 5, "end"]
    assert fields(events, "started") == [
        {"job_id": "job-1", "worker_id": "worker-1", "node": "here", "model": "echo-model"}
    ]
    assert "".join(t["t"] for t in fields(events, "token")) == "one two three one two"
    assert [t["i"] for t in fields(events, "token")] == [1, 2, 3, 4, 5]
    (end,) = fields(events, "end")
    assert (end["tokens_in"], end["tokens_out"], end["stop_reason"]) == (3, 5, "length")
    assert 0 <= end["ttft_ms"] <= end["duration_ms"]


async def test_a_job_without_an_id_gets_one(open_worker):
    async with open_worker(rate="1000") as worker:
        events = await worker.events(job_id="")
    assert fields(events, "started")[0]["job_id"].startswith("job-")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": "   "}, 400, "empty"),
        ({"prompt": "w " * 20}, 400, "20 tokens; the context holds 10"),
        ({"max_tokens": 99}, 400, "at most 7 are left"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"job_id": "a b"}, 400, "job_id"),
        ({"surprise": 1}, 400, "surprise"),
    ],
)
async def test_a_refusal_before_the_start_is_a_plain_error_and_leaves_nothing_running(
    open_worker, body, status, said
):
    async with open_worker(context="10") as worker:
        request = {"job_id": "j", "prompt": "one two three"} | body
        response = await worker.client.post("/execute", json=request)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        assert said in response.json()["error"]["message"]
        assert "rbee_worker_jobs_running 0" in await running(worker)


async def test_two_jobs_of_one_id_at_once_are_a_conflict(open_worker):
    async with open_worker() as worker, worker.stream(max_tokens=1000) as stream:
        await anext(stream)
        response = await worker.client.post("/execute", json={"job_id": "job-1", "prompt": "x"})
        assert response.status_code == 409


async def test_delete_ends_the_stream_with_cancelled_and_is_idempotent(open_worker):
    async with open_worker() as worker, worker.stream(max_tokens=1000) as stream:
        await anext(stream)
        for _ in range(2):
            assert (await worker.client.delete("/execute/job-1")).status_code == 204
        rest = [event async for event in stream]
        assert names(rest)[-1] == "error"
        assert names(rest).count("error") == 1
        assert fields(rest, "error")[0]["code"] == "cancelled"
        assert (await worker.client.delete("/execute/never-was")).status_code == 204
        assert 'rbee_worker_jobs_total{outcome="cancelled"} 1' in await running(worker)


async def test_a_client_that_leaves_aborts_its_generation_at_once(open_worker):
    async with open_worker() as worker:
        async with open_client(worker.url, TOKEN) as other:
            body = {"job_id": "job-9", "prompt": "x", "max_tokens": 1000}
            async with other.stream("POST", "/execute", json=body) as response:
                await anext(response.aiter_raw())
                assert "rbee_worker_engine_requests 1" in await running(worker)
        with trio.fail_after(0.3):
            while "rbee_worker_engine_requests 0" not in await running(worker):
                pass


async def test_health_is_open_and_everything_else_needs_the_token(open_worker):
    async with open_worker() as worker, httpx.AsyncClient(base_url=worker.url) as stranger:
        health = (await stranger.get("/health")).json()
        assert health["component"] == "llm-worker-rbee"
        assert (health["id"], health["owner"], health["state"]) == (
            "worker-1", "operator", "ready",
        )  # fmt: skip
        for method, path in (
            ("GET", "/v1/ready"), ("POST", "/execute"), ("DELETE", "/execute/x"),
            ("POST", "/v1/admin/shutdown"), ("GET", "/metrics"), ("GET", "/v1/models"),
        ):  # fmt: skip
            assert (await stranger.request(method, path)).status_code == 401


async def test_ready_and_metrics_tell_the_state(open_worker):
    async with open_worker() as worker:
        response = await worker.client.get("/v1/ready")
        assert response.status_code == 200
        state = response.json()
        assert (state["worker_id"], state["state"], state["progress"]) == ("worker-1", "ready", "")
        await worker.events(max_tokens=4)
        metrics = (await worker.client.get("/metrics")).text
        assert "rbee_worker_ready 1" in metrics
        assert "rbee_worker_tokens_in_total 3" in metrics
        assert "rbee_worker_tokens_out_total 4" in metrics
        assert 'rbee_worker_jobs_total{outcome="done"} 1' in metrics


async def ready_state(worker):
    return (await worker.client.get("/v1/ready")).json()


async def test_it_tells_how_long_it_has_had_no_work_and_how_long_it_is_to_stay(open_worker):
    async with open_worker(rate="50") as worker:
        new = await ready_state(worker)
        assert (new["running"], new["keep_alive"]) == (0, 300)
        await worker.events(max_tokens=1, keep_alive=0.0)
        used = await ready_state(worker)
        assert (used["running"], used["keep_alive"]) == (0, 0)
        assert used["idle"] < 1
        async with worker.stream(max_tokens=7, keep_alive=-1.0) as stream:
            await anext(stream)
            busy = await ready_state(worker)
            assert (busy["running"], busy["idle"], busy["keep_alive"]) == (1, 0, -1)


async def test_it_tells_whether_anybody_has_used_it(open_worker):
    async with open_worker(rate="1000") as worker:
        assert (await ready_state(worker))["is_fresh"]
        await worker.events(max_tokens=1)
        assert not (await ready_state(worker))["is_fresh"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/ready"), ("POST", "/v1/admin/shutdown")])
async def test_what_is_meant_for_a_worker_that_had_its_port_is_refused(open_worker, method, path):
    async with open_worker() as worker:
        headers = {"x-rbee-worker-id": "worker-0"}
        refused = await worker.client.request(method, path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "other_worker")
        assert (await ready_state(worker))["state"] == "ready"


async def test_asked_to_stop_if_idle_it_stays_at_its_work(open_worker):
    async with open_worker(rate="50") as worker:
        async with worker.stream(max_tokens=7) as stream:
            await anext(stream)
            busy = await worker.client.post("/v1/admin/shutdown", json={"if_idle": True})
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "worker_busy")
            assert names([event async for event in stream])[-1] == "end"
        idle = await worker.client.post("/v1/admin/shutdown", json={"if_idle": True})
        assert idle.status_code == 202


async def test_a_job_whose_body_comes_after_the_stop_is_refused_before_it_began(open_worker):
    async with open_worker() as worker:
        port = httpx.URL(worker.url).port
        body = b'{"job_id": "late", "prompt": "x"}'
        head = (
            f"POST /execute HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(head.encode() + body[:5])
            await trio.sleep(0.1)  # the head has been read, and nothing shows that
            stopped = await worker.client.post("/v1/admin/shutdown", json={"if_idle": True})
            assert stopped.status_code == 202
            await stream.send_all(body[5:])
            answer = await stream.receive_some()
        assert b" 503 " in answer.splitlines()[0], answer


async def test_what_neither_we_nor_the_engine_serve_is_not_found(open_worker):
    async with open_worker() as worker:
        assert (await worker.client.get("/v1/files")).status_code == 404
