"""The figures, of all three daemons of a cluster, and what the dashboard shows of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from rbee import open_cluster
from rbee.cluster import AsyncCluster
from rbee.metrics import NAMES, OTHER, ByName, Histogram, counter, expose, histogram

DOCS = Path(__file__).parent.parent / "docs"
MODEL = "echo?rate=500"
NAME = re.compile(r"\b(rbee_[a-z_]+|vllm:[a-z_]+)\b")

Labels = dict[str, str]


@attrs.frozen
class Scraped:
    """What one daemon exports."""

    text: str

    @property
    def kinds(self) -> dict[str, str]:
        return {family.name: family.type for family in text_string_to_metric_families(self.text)}

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        families = text_string_to_metric_families(self.text)
        return {sample.name for family in families for sample in family.samples}

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of a sample over all that ``labels`` do not tell apart."""
        families = text_string_to_metric_families(self.text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


# keeping them ---------------------------------------------------------------------------------
def test_a_histogram_counts_up_to_each_bound() -> None:
    one = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.5):
        one.observe(value)
    told = Scraped(expose(lambda: [histogram("x_seconds", "X.", {("a",): one}, ("of",))]).decode())
    counts = [told.value("x_seconds_bucket", of="a", le=le) for le in ("1.0", "2.0", "+Inf")]
    assert counts == [2, 3, 4]
    assert told.value("x_seconds_sum") == 5.5
    assert told.value("x_seconds_count") == 4


def test_models_that_clients_name_are_bounded() -> None:
    by = ByName((1.0,))
    for number in range(NAMES + 50):
        by.of(f"m{number}").observe(0.1)
    assert len(by.all()) == NAMES + 1
    assert by.all()[OTHER,].count == 50
    assert by.of("m0").count == 1


def test_what_a_client_names_cannot_break_the_text() -> None:
    odd = 'a"} 1\nrbee_x 2\\'
    text = expose(lambda: [counter("x_total", "X.", {(odd,): 3}, ("of",))]).decode()
    assert Scraped(text).value("x_total", of=odd) == 3


def test_nothing_of_ours_gets_into_the_registry_of_the_program(tmp_path: Path) -> None:
    """Nor into its directory for many processes; and who does not scrape does not import."""
    code = """
import sys
import rbee.queen.daemon, rbee.hive.daemon, rbee.worker.metrics
from rbee.metrics import counter, expose
assert "prometheus_client" not in sys.modules
assert b"x_total 1.0" in expose(lambda: [counter("x_total", "X.", 1)])
from prometheus_client import REGISTRY, generate_latest
assert b"x_total" not in generate_latest(REGISTRY)
"""
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
    assert not list(tmp_path.iterdir())


# a cluster's ----------------------------------------------------------------------------------
@pytest.fixture
async def cluster() -> AsyncGenerator[AsyncCluster, None]:
    with trio.fail_after(60):
        async with open_cluster(models=[MODEL], engine="echo") as cluster:
            yield cluster


async def scrape(cluster: AsyncCluster) -> dict[str, Scraped]:
    """Scrape all that the queen names, as Prometheus would."""
    headers = {"authorization": f"Bearer {cluster.token}"}
    told = {}
    async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
        for target in (await client.get(f"{cluster.url}/v2/targets")).json():
            answer = await client.get(f"http://{target['targets'][0]}/metrics")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            told[target["labels"]["component"]] = Scraped(answer.text)
    return told


async def post(cluster: AsyncCluster, path: str, body: Any, **more: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {cluster.token}", **more}
    async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
        return await client.post(cluster.url + path, json=body)


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 10}


@pytest.mark.slow
async def test_a_cluster_tells_what_it_has_done(cluster: AsyncCluster) -> None:
    streamed = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    assert (await post(cluster, "/v1/chat/completions", streamed)).status_code == 200
    assert (await post(cluster, "/v1/chat/completions", CHAT)).status_code == 200
    assert (await post(cluster, "/v1/completions", {"model": "gpt-9"})).status_code == 404
    await cluster.client.infer(MODEL, "one two", max_tokens=20)

    told = await scrape(cluster)
    queen = told["queen"]
    ended = "rbee_queen_requests_total"
    assert queen.value(ended, route="/v1/chat/completions", code="200", error="") == 2
    assert queen.value(ended, route="/v1/completions", code="404", error="model_not_found") == 1
    assert queen.value(ended, route="/v2/tasks", code="200", error="") == 1
    for name, count in (("ttft", 2), ("queue", 3)):
        assert queen.value(f"rbee_queen_{name}_seconds_count", model=MODEL) == count, name
    assert queen.value("rbee_queen_inter_token_seconds_count", model=MODEL) > 5
    assert queen.value("rbee_queen_overhead_seconds_count") >= 2
    assert queen.value("rbee_queen_overhead_seconds_sum") < 0.5
    assert queen.value("rbee_queen_tokens_out_total", model=MODEL) == 40
    assert queen.value("rbee_queen_workers", state="ready") == 1
    assert queen.value("rbee_queen_hives", state="ready") == 1
    assert queen.value("rbee_queen_requests_running", route="/v2/tasks") == 0
    assert told["worker"].value("rbee_worker_tokens_out_total") == 20
    assert told["worker"].value("rbee_worker_ttft_seconds_count") == 1
    assert told["hive"].value("rbee_hive_workers", state="ready") == 1
    check_named(told)
    await check_followed(cluster, MODEL)


async def check_followed(cluster: AsyncCluster, model: str) -> None:
    """See that a request is found by its id in the log of the worker that did it."""
    named = {"x-request-id": "mine-1"}
    job = {"model": model, "prompt": "one", "max_tokens": 1}
    answer = await post(cluster, "/v2/tasks", job, **named)
    assert answer.headers["x-request-id"] == "mine-1"
    assert "event: end\n" in answer.text
    (worker,) = await cluster.client.workers()
    log = (cluster.queen.home / "logs" / f"{worker.worker_id}.log").read_text()
    assert " done, 1 tokens [mine-1]\n" in log


@pytest.mark.slow
async def test_the_end_of_a_worker_and_of_a_hive_is_timed(cluster: AsyncCluster) -> None:
    (worker,) = await cluster.client.workers()
    await cluster.client.stop_worker(worker.worker_id)
    hive = (await scrape(cluster))["hive"]
    assert hive.value("rbee_hive_cleans_total") == 1
    assert 0 < hive.value("rbee_hive_last_clean_seconds") < 5
    assert hive.value("rbee_hive_worker_ends_total", state="stopped") == 1
    await cluster.client.stop_hive("localhost")
    queen = (await scrape(cluster))["queen"]
    assert queen.value("rbee_queen_cleans_total") == 1
    assert 0 < queen.value("rbee_queen_last_clean_seconds") < 8


def check_named(told: dict[str, Scraped]) -> None:
    """See that the dashboard shows what there is, and the document names all of it."""
    there = set().union(*(one.names for one in told.values()))
    kinds = {name: kind for one in told.values() for name, kind in one.kinds.items()}
    shown = {name for expr in queries() for name in NAME.findall(expr)}
    ours = {name for name in shown if name.startswith("rbee_")}
    assert ours - there == {"rbee_hive_worker_ends_total"}  # none has ended
    documented = dict(
        re.findall(r"^\| `(\w+)` \| (\w+) \|", (DOCS / "metrics.md").read_text(), re.M)
    )
    assert documented == {name_of(name, kind): kind for name, kind in kinds.items()
                          if name.startswith("rbee_")}  # fmt: skip


def name_of(family: str, kind: str) -> str:
    return f"{family}_total" if kind == "counter" else family


def queries() -> list[str]:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    return [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    panels = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 36
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            # A label is {{label}}; in single braces it would be shown as it stands.
            assert not re.search(r"(?<!\{)\{\w+\}", target["legendFormat"])
    for expr in queries():
        assert expr.count("(") == expr.count(")")
        assert NAME.search(expr), expr
    assert math.prod(len(panel.get("targets", "x")) for panel in panels)  # none shows nothing
