"""The pytest plugin in a suite of somebody else: an empty folder, no ini, any other plugins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from rbee.testing.processes import LeakCheck

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow

OTHERS = ("-p", "no:cacheprovider")
NO_VLLM = """
    import importlib.util

    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: name != "vllm" and find_spec(name, *more) or None
"""
KINDS = """
    def test_a_cluster_of_its_own(rbee_cluster):
        [worker] = rbee_cluster.client.workers()
        assert (worker.engine, worker.state) == ("echo", "ready")
        assert str(rbee_cluster.client.infer("echo", "one two", max_tokens=3)) == "one two one"

    def test_a_shared_one(rbee_client, rbee_session_cluster):
        assert rbee_client.url == rbee_session_cluster.url
        names = [type(event).__name__ for event in rbee_client.stream("echo", "a", max_tokens=1)]
        assert names == ["Queued", "Started", "Token", "End"]
"""


@pytest.fixture(autouse=True)
def homes(leaks: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Take our suite's settings off the one under test, and see that it leaves nothing.

    Yields the directory that its clusters' homes are in.
    """
    for name in ("PYTEST_ADDOPTS", "RBEE_HOME", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    yield temporary
    assert leaks.find() == []
    assert list(temporary.glob("rbee-home-*")) == []


def run(pytester: pytest.Pytester, code: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(code)
    return pytester.runpytest_subprocess(*OTHERS, *arguments)


def test_a_suite_in_an_empty_folder_uses_the_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(NO_VLLM)
    result = run(
        pytester,
        KINDS
        + """
    import os
    import urllib.request

    import pytest

    def test_an_openai_client_finds_it(openai_base_url, openai_api_key, rbee_session_cluster):
        assert openai_base_url == rbee_session_cluster.url + "/v1" == os.environ["OPENAI_BASE_URL"]
        assert openai_api_key == rbee_session_cluster.token == os.environ["OPENAI_API_KEY"]

    @pytest.mark.rbee(model="echo?rate=1000", lease=4)
    def test_a_marker_says_what_runs(rbee_client, openai_base_url):
        assert [worker.model for worker in rbee_client.workers()] == ["echo?rate=1000"]
        assert openai_base_url == rbee_client.url + "/v1"

    def test_the_environment_is_given_back():
        assert "OPENAI_BASE_URL" not in os.environ

    def test_without_a_vllm_it_is_skipped_with_the_reason(rbee_vllm):
        pass
        """,
        "-rs",
    )
    result.assert_outcomes(passed=5, skipped=1)
    result.stdout.fnmatch_lines(["*vLLM is not installed here*"])


@pytest.mark.skipif(find_spec("pytest_asyncio") is None, reason="needs pytest-asyncio")
def test_it_works_beside_asyncio_and_in_trio(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
    import pytest
    import rbee

    @pytest.mark.asyncio
    async def test_asyncio(rbee_session_cluster):
        client = rbee.AsyncClient(rbee_session_cluster.url, rbee_session_cluster.token)
        assert (await client.infer("echo", "a b", max_tokens=2)).text == "a b"

    @pytest.mark.trio
    async def test_trio(rbee_cluster_trio):
        assert (await rbee_cluster_trio.client.infer("echo", "a b", max_tokens=2)).text == "a b"
        """,
    )
    result.assert_outcomes(passed=2)


@pytest.mark.skipif(find_spec("xdist") is None, reason="needs pytest-xdist")
def test_runs_side_by_side_do_not_meet_and_tell_what_is_left(pytester: pytest.Pytester) -> None:
    code = """
    import pytest, rbee

    @pytest.mark.parametrize("number", range(2))
    def test_an_option_says_what_runs(rbee_session_cluster, number):
        [worker] = rbee_session_cluster.client.workers()
        assert (worker.model, *rbee_session_cluster.models) == ("echo?rate=9", "echo?rate=9")

    def test_leaving_it_open():
        rbee.Cluster().start()
    """
    result = run(pytester, code, "-n", "2", "--rbee-model", "echo?rate=9")
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*left behind by clusters of rbee*", "*the home of a cluster*"])


def test_what_is_left_fails_the_run_and_is_ended(pytester: pytest.Pytester) -> None:
    code = """
    import rbee

    def test_leaving_it_open():
        rbee.Cluster(models=["echo"], engine="echo").start()
    """
    result = run(pytester, code)
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*left behind by clusters of rbee*", "process *rbee-guard*", "*the home of a cluster*"]
    )


HOLD = """
    import pathlib, time

    def test_it(rbee_cluster):
        pathlib.Path("ready").touch()
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing(
    number: signal.Signals, pytester: pytest.Pytester, leaks: LeakCheck, homes: Path
) -> None:
    pytester.makepyfile(HOLD)
    popen = pytester.popen(
        [sys.executable, "-m", "pytest", *OTHERS], stdout=subprocess.DEVNULL, stderr=None,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert leaks.tree is not None
    until(lambda: (pytester.path / "ready").exists(), 30)
    leaks.tree.refresh(popen.pid)
    os.kill(popen.pid, number)
    popen.wait()
    leaks.wait_clean_sync(0 if number == signal.SIGINT else 3)
    until(lambda: not list(homes.glob("rbee-home-*")), 3)


def until(is_so: object, within: float) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
