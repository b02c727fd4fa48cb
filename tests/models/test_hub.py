"""Models from a hub: a real server on loopback; the child's program runs here, unless slow."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import trio
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from rbee.errors import (
    BadInputError,
    ForbiddenError,
    InsufficientError,
    NotFoundError,
    PeerError,
    RbeeError,
    UnauthorizedError,
    UnavailableError,
)
from rbee.home import Home
from rbee.models import hub as program
from rbee.models import preflight, transfer
from rbee.models.catalog import list_models
from rbee.models.child import Runner
from rbee.models.inspect import inspect_model
from rbee.models.provision import HASTE, PATIENCE, LocalModel, provision
from rbee.models.reference import HubRepo, slug
from rbee.testing.hub_server import Fault, HubServer, Repo

WEIGHTS = "model.safetensors"
STALL = ["--stall", "0.2"]
QUICK = ["--stall", "5", "--pause", "0.005", "--tries", "3", "--contact", "2", "--connect", "1"]
TOKEN = "hf_secretsecret"
Get = Callable[..., Any]
Leftovers = Callable[[], list[Path]]


@pytest.fixture
def hub(tiny_once: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serve the tiny model as ``org/tiny``."""
    files: dict[str, bytes | Path] = {p.name: p.read_bytes() for p in tiny_once.iterdir()}
    files |= {"README.md": b"hello", "evil.py": b"1/0"}
    with HubServer({"org/tiny": Repo(files)}).serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield hub
        close_session()


@pytest.fixture
def repo(hub: HubServer) -> Repo:
    return hub.repos["org/tiny"]


class Children:
    """Runs the program in a thread; ``count`` is how often."""

    def __init__(self) -> None:
        self.count = 0
        self.patience: list[float] = []

    options: Sequence[str] = QUICK

    async def __call__(self, argv: Sequence[str], *, log: Path, **_: Any) -> int:
        self.count += 1
        self.patience.append(float(argv[argv.index("--contact") + 1]))
        words = [*argv[argv.index("rbee.models.hub") + 1 :], *self.options]

        def run() -> int:
            with log.open("a") as file, redirect_stdout(file):
                return program.main(words)

        return await trio.to_thread.run_sync(run)


@pytest.fixture
def in_thread() -> Children:
    return Children()


@pytest.fixture
def get(home: Home, in_thread: Children, narrate: Any) -> Get:
    async def get(name: str = "hf:org/tiny", run: Runner = in_thread, **more: Any) -> LocalModel:
        with trio.fail_after(20):
            return await provision(name, home, dtype="float32", run=run, narrate=narrate, **more)

    return get


def weights(repo: Repo) -> bytes:
    found = repo.files[WEIGHTS]
    assert isinstance(found, bytes)
    return found


def partial_of(home: Home, name: str = "org/tiny") -> Path:
    return home.models / ".partial" / slug(HubRepo(name))


def logs(home: Home) -> str:
    return "\n".join(path.read_text() for path in home.logs.iterdir())


# what comes ---------------------------------------------------------------------------------------


async def test_a_model_is_fetched_once_and_then_on_disk_without_any_request(
    get: Get,
    hub: HubServer,
    repo: Repo,
    home: Home,
    leftovers: Leftovers,
    narrate: Any,
) -> None:
    model = await get()
    asked = len(hub.requests)
    assert await get() == model
    assert (model.reference, model.served_names) == ("hf:org/tiny", ("hf:org/tiny", "org/tiny"))
    assert (len(hub.requests), hub.sent[WEIGHTS]) == (asked, len(weights(repo)))
    assert inspect_model(model.directory).parameters == model.parameters > 0
    assert not {"README.md", "evil.py"} & {path.name for path in model.directory.iterdir()}
    (item,) = list_models(home)
    assert item.entry
    assert (item.entry.reference, item.entry.source) == ("hf:org/tiny", "hf")
    assert (item.entry.version, item.damage) == (repo.commit, "")
    sums = {file.name: file.sha256 for file in item.entry.files}
    assert sums[WEIGHTS] == hashlib.sha256(weights(repo)).hexdigest()
    assert leftovers() == []
    assert not partial_of(home).exists()
    assert list(dict.fromkeys(narrate.actions)) == ["fetch", "download", "fetched"]
    assert narrate.shares[-1] == 1.0


async def test_a_revision_is_asked_for_and_kept_beside_others(
    get: Get, hub: HubServer, repo: Repo
) -> None:
    repo.revisions = ("main", "v1.0", "refs/pr/2")
    names = ("hf:org/tiny", "hf:org/tiny@v1.0", "hf:org/tiny@refs/pr/2")
    assert len({(await get(name)).directory for name in names}) == 3
    assert "/api/models/org/tiny/revision/v1.0" in {request.path for request in hub.requests}
    # files are asked for by commit: a branch may move meanwhile
    assert all(f"/resolve/{repo.commit}/" in request.path for request in hub.gets(WEIGHTS))


async def test_a_mirror_that_lists_only_names_is_asked_for_each_file(
    get: Get, hub: HubServer, repo: Repo, home: Home
) -> None:
    repo.bare = True
    await get()
    assert [r.method for r in hub.requests].count("HEAD") == 5
    (item,) = list_models(home)
    assert item.entry
    assert all(file.size for file in item.entry.files)
    assert [file.name for file in item.entry.files if file.sha256] == [WEIGHTS]


async def test_a_damaged_file_is_fetched_again(get: Get, repo: Repo) -> None:
    model = await get()
    (model.directory / WEIGHTS).write_bytes(b"cut")
    assert (await get()).directory == model.directory
    assert (model.directory / WEIGHTS).read_bytes() == weights(repo)


async def test_a_whole_model_that_cannot_be_loaded_leaves_nothing(
    get: Get, repo: Repo, home: Home, leftovers: Leftovers
) -> None:
    repo.files["config.json"] = b"{}"
    with pytest.raises(BadInputError, match=r"hf:org/tiny cannot be loaded: .*architectures"):
        await get()
    assert leftovers() == []
    assert not partial_of(home).exists()
    assert list_models(home) == []


# a line that fails --------------------------------------------------------------------------------


async def test_a_stalled_transfer_goes_on_where_it_was(
    get: Get, hub: HubServer, repo: Repo, narrate: Any, in_thread: Children
) -> None:
    in_thread.options = [*QUICK, *STALL]
    hub.faults[WEIGHTS] = [Fault("stall", at=300_000), Fault("stall", at=300_000)]
    model = await get()
    assert (model.directory / WEIGHTS).read_bytes() == weights(repo)
    ranges = [request.range for request in hub.gets(WEIGHTS)]
    assert ranges[:3] == ["", "bytes=300000-", "bytes=600000-"]
    assert "no byte for 0.2 s" in dict(narrate.lines)["retry"]


async def test_a_transfer_that_is_reset_goes_on_where_it_was(
    get: Get, hub: HubServer, repo: Repo
) -> None:
    hub.faults[WEIGHTS] = [Fault("short", at=1000), Fault("reset", at=300_000)]
    model = await get()
    assert (model.directory / WEIGHTS).read_bytes() == weights(repo)
    last = hub.gets(WEIGHTS)[-1].range  # what had arrived and was not read yet is lost
    assert 1000 <= int(last.removeprefix("bytes=").removesuffix("-")) <= 301_000


async def test_a_short_answer_is_completed(get: Get, hub: HubServer, repo: Repo) -> None:
    hub.faults[WEIGHTS] = [Fault("short", at=1000)]
    model = await get()
    assert (model.directory / WEIGHTS).read_bytes() == weights(repo)
    assert [request.range for request in hub.gets(WEIGHTS)] == ["", "bytes=1000-"]
    assert hub.sent[WEIGHTS] == len(weights(repo))  # nothing came twice


async def test_a_hub_without_ranges_is_read_from_the_beginning(
    get: Get, hub: HubServer, repo: Repo
) -> None:
    hub.faults[WEIGHTS] = [Fault("short", at=1000), Fault("no_range")]
    model = await get()
    assert (model.directory / WEIGHTS).read_bytes() == weights(repo)
    assert hub.sent[WEIGHTS] == 1000 + len(weights(repo))


async def test_a_hub_without_ranges_that_is_always_cut_is_given_up(
    get: Get, hub: HubServer
) -> None:
    hub.faults[WEIGHTS] = [Fault("no_range", at=1000)] * 9
    with pytest.raises(UnavailableError, match="3 times in a row"):
        await get()
    assert len(hub.gets(WEIGHTS)) == 4  # the first one gained something


@pytest.mark.parametrize("fault", [Fault("stall"), Fault("reset"), Fault("status", status=503)])
async def test_tries_without_a_byte_gained_come_to_an_end(
    get: Get, hub: HubServer, home: Home, in_thread: Children, fault: Fault
) -> None:
    in_thread.options = [*QUICK, *STALL]
    hub.faults[WEIGHTS] = [Fault("short", at=500_000), *[fault] * 9]
    with pytest.raises(UnavailableError, match=r"3 times in a row; what came .*is kept") as caught:
        await get()
    assert (caught.value.code, len(hub.gets(WEIGHTS))) == ("download_failed", 4)
    (unfinished,) = list_models(home)
    assert "goes on with it" in unfinished.damage
    hub.faults.clear()
    await get()
    assert [item.damage for item in list_models(home)] == [""]
    assert hub.gets(WEIGHTS)[-1].range == "bytes=500000-"
    assert not partial_of(home).exists()


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
async def test_wrong_bytes_are_thrown_away_and_fetched_once_more(
    get: Get, hub: HubServer, repo: Repo, name: str
) -> None:
    hub.faults[name] = [Fault("wrong")]
    model = await get()
    assert (model.directory / name).read_bytes() == repo.files[name]


async def test_bytes_that_stay_wrong_are_an_error_and_not_kept(
    get: Get, hub: HubServer, home: Home
) -> None:
    hub.faults[WEIGHTS] = [Fault("wrong")] * 9
    with pytest.raises(PeerError, match="its hash is not the one") as caught:
        await get()
    assert (caught.value.code, len(hub.gets(WEIGHTS))) == ("wrong_hash", 2)
    assert _arrived(home) == 0


async def test_more_bytes_than_there_are_is_a_failed_try(
    get: Get, hub: HubServer, repo: Repo
) -> None:
    hub.faults[WEIGHTS] = [Fault("long")]
    assert ((await get()).directory / WEIGHTS).read_bytes() == weights(repo)


async def test_what_an_older_commit_left_is_not_mixed_in(
    get: Get, hub: HubServer, repo: Repo, home: Home
) -> None:
    hub.faults[WEIGHTS] = [Fault("short", at=1000), *[Fault("reset")] * 9]
    with pytest.raises(UnavailableError):
        await get()
    hub.faults.clear()
    repo.commit, repo.files[WEIGHTS] = "d" * 40, weights(repo)[:-4] + b"\0\0\0\1"
    hub.etags.clear()
    hub.requests.clear()
    assert ((await get()).directory / WEIGHTS).read_bytes() == weights(repo)
    assert [request.range for request in hub.gets(WEIGHTS)] == [""]
    assert hub.gets("tokenizer.json") == []  # the same bytes as before


# redirects and tokens -----------------------------------------------------------------------------


async def test_the_token_goes_to_the_hub_and_not_to_another_host(
    get: Get, hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, home: Home
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer({"org/tiny": Repo(repo.files, repo.commit)}).serve() as store:
        repo.token, repo.redirect = TOKEN, store.url
        await get()
        close_session()
    assert {request.token for request in hub.requests} == {TOKEN}
    assert {request.token for request in store.requests} == {""}
    assert (hub.sent[WEIGHTS], store.sent[WEIGHTS]) == (0, len(weights(repo)))


async def test_the_token_is_in_no_log_and_no_error(
    get: Get, hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, home: Home, narrate: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\u20ac")  # cannot even be sent
    with pytest.raises(RbeeError) as caught:
        await get()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo.token = "another"
    with pytest.raises(UnauthorizedError) as refused:
        await get()
    told = (str(caught.value), str(refused.value), refused.value.hint, str(narrate))
    assert TOKEN not in "\n".join((logs(home), *told))


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "told"), [("", "a token in HF_TOKEN"), ("hf_wrong", "does not accept the token")]
)
async def test_a_private_repository_needs_a_token(
    get: Get, repo: Repo, monkeypatch: pytest.MonkeyPatch, token: str, told: str
) -> None:
    repo.token = TOKEN
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UnauthorizedError, match=told) as caught:
        await get()
    assert caught.value.hint.endswith("hf auth login && rbee-keeper model pull hf:org/tiny")
    assert caught.value.hint.startswith("unset HF_TOKEN") is bool(token)


@pytest.mark.parametrize("token", ["", TOKEN])
async def test_a_gated_repository_names_the_page_with_its_terms(
    get: Get, hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    repo.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ForbiddenError, match=r"accepted the terms.*it says: GatedRepo!") as caught:
        await get()
    assert caught.value.code == "gated_model"
    assert f"{hub.url}/org/tiny" in caught.value.hint
    assert all(len(hub.gets(name)) <= 1 for name in repo.files)  # asking again would not help


@pytest.mark.parametrize(
    ("name", "token", "code"),
    [
        ("hf:org/none", TOKEN, "model_not_found"),
        ("hf:org/none", "", "hub_unauthorized"),  # a hub does not tell it from a private one
        ("hf:org/tiny@nope", "", "revision_not_found"),
    ],
)
async def test_what_is_not_there_is_told(
    get: Get,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    token: str,
    code: str,
    home: Home,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((NotFoundError, UnauthorizedError)) as caught:
        await get(name)
    assert (caught.value.code, len(hub.requests)) == (code, 1)
    assert list(home.models.glob(".partial/*")) == []


async def test_a_hub_in_trouble_is_asked_twice(get: Get, hub: HubServer) -> None:
    hub.failures = [503]
    await get()
    hub.failures = [500, 502]
    with pytest.raises(UnavailableError, match="answers 502") as caught:
        await get("hf:org/tiny@main")
    assert caught.value.code == "hub_failed"


async def test_a_repository_without_safetensors_tells_its_formats(get: Get, repo: Repo) -> None:
    repo.files = {"config.json": b"{}", "model.gguf": b"GGUF"}
    with pytest.raises(BadInputError, match=r"found: weights as \*\.gguf"):
        await get()


async def test_what_is_no_hub_is_told(
    get: Get, monkeypatch: pytest.MonkeyPatch, hub: HubServer
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(BadInputError, match="needed: an address"):
        await get()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    for hub.garbage in (b"<html>log in here</html>", b"[]", b'{"siblings": [{}]}'):
        with pytest.raises(PeerError, match="does not answer as a hub does"):
            await get()


# no hub -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid"])
@pytest.mark.usefixtures("hub")
async def test_a_hub_that_cannot_be_reached_is_told_at_once(
    get: Get, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    began = trio.current_time()
    with pytest.raises(UnavailableError, match=f"{endpoint} cannot be reached") as caught:
        await get()
    assert caught.value.code == "hub_unreachable"
    assert trio.current_time() - began < 3


async def test_a_hub_that_swallows_the_first_request_is_given_up_in_time(
    get: Get, hub: HubServer, in_thread: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_thread.options = [*QUICK, "--contact", "0.1"]
    monkeypatch.setattr(program.Hub, "_contact", lambda _: hub.closing.wait(5))
    with pytest.raises(UnavailableError, match=r"no answer for 0\.1 s"):
        await get()
    hub.closing.set()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
async def test_offline_what_is_here_works_and_the_rest_is_refused_without_a_child(
    get: Get, hub: HubServer, in_thread: Children, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = await get()
    monkeypatch.setenv(name, "1")
    assert await get() == model
    with pytest.raises(UnavailableError, match=f"{name}=1 forbids") as caught:
        await get("hf:org/other")
    assert (caught.value.code, in_thread.count) == ("hub_offline", 1)


async def test_an_alias_goes_on_to_its_next_source(
    get: Get, in_thread: Children, narrate: Any, hub: HubServer
) -> None:
    model = await get("mine", aliases={"mine": ("hf:org/none", "hf:org/tiny")})
    assert model.served_names == ("hf:org/tiny", "mine", "org/none")
    assert list(dict.fromkeys(narrate.actions)) == ["skip", "fetch", "download", "fetched"]
    assert in_thread.patience == [HASTE, PATIENCE]  # where something else may work, less of it


# room ---------------------------------------------------------------------------------------------


async def test_the_disk_is_checked_before_and_what_is_there_counts(
    get: Get, hub: HubServer, repo: Repo, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults[WEIGHTS] = [Fault("short", at=1000), *[Fault("reset")] * 9]
    with pytest.raises(UnavailableError):
        await get()
    hub.faults.clear()
    hub.requests.clear()
    model_files = [name for name in repo.files if name not in ("README.md", "evil.py")]
    have = sum(path.stat().st_size for path in partial_of(home).iterdir())
    missing = sum(map(repo.size, model_files)) - have
    monkeypatch.setattr(preflight, "free_disk", lambda _: missing - 1)
    with pytest.raises(InsufficientError) as caught:
        await get()
    assert caught.value.details == {"required": missing, "available": missing - 1}
    assert hub.gets(WEIGHTS) == []
    monkeypatch.setattr(preflight, "free_disk", lambda _: missing)
    await get()


async def test_a_disk_that_fills_up_on_the_way_is_told(
    get: Get, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer.os, "write", write)  # of the module `os` itself: only for a moment
    with pytest.raises(InsufficientError, match="the disk is full") as caught:
        await get()
    monkeypatch.undo()
    assert caught.value.code == "insufficient_disk"
    assert caught.value.details["required"] > 0


# more than one ------------------------------------------------------------------------------------


async def test_two_pulls_at_once_are_one_download(
    get: Get, hub: HubServer, repo: Repo, in_thread: Children, narrate: Any
) -> None:
    models: list[LocalModel] = []

    async def take() -> None:
        models.append(await get())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        nursery.start_soon(take)
    assert models[0] == models[1]
    assert (in_thread.count, hub.sent[WEIGHTS]) == (1, len(weights(repo)))
    assert "wait" in narrate.actions


# for real -----------------------------------------------------------------------------------------


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - another process gives no event to wait for
        await trio.sleep(0.01)


@pytest.mark.slow
async def test_cancelling_ends_the_child_and_keeps_what_came(
    get: Get,
    hub: HubServer,
    repo: Repo,
    home: Home,
    run_child: Runner,
    leftovers: Leftovers,
) -> None:
    hub.faults[WEIGHTS] = [Fault("stall", at=400_000)]
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, "hf:org/tiny", run_child)
            await until(lambda: _arrived(home))
            scope.cancel()
    assert scope.cancelled_caught
    assert leftovers() == []
    kept = _arrived(home)
    model = await get(run=run_child)
    assert hub.gets(WEIGHTS)[-1].range == f"bytes={kept}-"
    assert (model.directory / WEIGHTS).read_bytes() == weights(repo)


def _arrived(home: Home) -> int:
    return sum(path.stat().st_size for path in partial_of(home).glob(f"*{WEIGHTS}"))


@pytest.mark.slow
async def test_a_pull_waits_for_another_process_and_uses_what_that_fetched(
    get: Get, hub: HubServer, repo: Repo, home: Home, short_path: Path, in_thread: Children,
    narrate: Any,
) -> None:  # fmt: skip
    hub.faults[WEIGHTS] = [Fault("stall", at=1000)]
    code = "from rbee.keeper.app import main; main()"
    env = {**os.environ, "RBEE_HOME": str(home.root), "XDG_RUNTIME_DIR": str(short_path)}
    other = subprocess.Popen([sys.executable, "-c", code, "model", "pull", "hf:org/tiny"], env=env)
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await until(lambda: hub.gets(WEIGHTS))
                nursery.start_soon(get)
                await until(lambda: "wait" in narrate.actions)
                hub.closing.set()  # the stalled answer ends
        assert await trio.to_thread.run_sync(other.wait) == 0
    finally:
        other.kill()
        other.wait()
    assert in_thread.count == 0
    assert hub.sent[WEIGHTS] == len(weights(repo))


@pytest.mark.slow
def test_the_hubs_library_stays_out_of_keeper_and_daemons() -> None:
    code = (
        "import sys, rbee.keeper.app, rbee.keeper.models, rbee.hive.daemon, rbee.queen.daemon, "
        "rbee.models.provision, rbee.hive.models; print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


async def test_what_cannot_be_a_repositorys_name_is_not_the_hubs_fault(
    get: Get, hub: HubServer
) -> None:
    with pytest.raises(BadInputError, match="hf:org/a--b cannot be the name of a repository"):
        await get("hf:org/a--b")
