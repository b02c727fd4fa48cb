"""The daemons answer as their documents say, whatever is sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.specs.openapi import checks

import rbee
from rbee.api.documents import document_of

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
# Words that are made up would end a daemon or go out into the network.
LEFT_OUT = {"path_regex": r"/shutdown|/v2/nodes$|/models$|/v2/hives", "method": ["POST", "DELETE"]}
quickly = settings(
    max_examples=1, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

queen = schemathesis.openapi.from_dict(document_of("queen"))
hive = schemathesis.openapi.from_dict(document_of("hive"))
worker = schemathesis.openapi.from_dict(document_of("worker"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[rbee.Cluster]:
    with rbee.Cluster(models=["echo?rate=10000"], engine="echo") as cluster:
        yield cluster


def ask(case: Case, cluster: rbee.Cluster, url: str) -> None:
    headers = {"Authorization": f"Bearer {cluster.token}"}
    case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, timeout=10)


@queen.exclude(**LEFT_OUT).parametrize()
@quickly
def test_queen(case: Case, cluster: rbee.Cluster) -> None:
    ask(case, cluster, cluster.url)


@hive.exclude(**LEFT_OUT).parametrize()
@quickly
def test_hive(case: Case, cluster: rbee.Cluster) -> None:
    (one,) = cluster.client.hives()
    ask(case, cluster, one.url)


@worker.exclude(**LEFT_OUT).parametrize()
@quickly
def test_worker(case: Case, cluster: rbee.Cluster) -> None:
    ready = [one for one in cluster.client.workers() if one.state == "ready"]
    ask(case, cluster, ready[0].url)
