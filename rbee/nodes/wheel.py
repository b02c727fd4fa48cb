"""A wheel of what is installed here: repacked from its RECORD, so that no build tool is needed.

The same way makes one of the running rbee, for nodes. Where it runs from a source tree, the package
comes from there and only the metadata from the installation. Equal contents make equal names.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import stat
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

import attrs

import rbee
from rbee.errors import MachineError
from rbee.hints import install
from rbee.home import writing

# What the installer has noted, and what the new wheel says anew.
NOTED = frozenset(
    {"RECORD", "RECORD.jws", "RECORD.p7s", "INSTALLER", "REQUESTED", "direct_url.json"}
)
SCRIPT_GROUPS = ("console_scripts", "gui_scripts")
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file: a zip knows no earlier time


@attrs.frozen
class Wheel:
    """A wheel on this machine's disk; ``digest`` is of its contents, whatever zipped them."""

    path: Path
    version: str
    digest: str


@attrs.frozen
class _File:
    data: bytes
    is_program: bool = False

    @property
    def record(self) -> tuple[str, int]:
        digest = base64.urlsafe_b64encode(hashlib.sha256(self.data).digest())
        return f"sha256={digest.rstrip(b'=').decode()}", len(self.data)


def pack_running(directory: Path) -> Wheel:
    """Make the wheel of the rbee that runs.

    Raises:
        MachineError: it was never installed, or its source tree is newer than its installation.
    """
    package = Path(rbee.__file__).parent
    try:
        found = distribution(rbee.__name__)
    except PackageNotFoundError:
        raise MachineError(
            f"rbee runs from {package} and was never installed, so it has no metadata for a wheel",
            code="not_installed",
            hint=install(),
        ) from None
    if found.version != rbee.__version__:
        raise MachineError(
            f"rbee in {package} is {rbee.__version__}, its installation says {found.version}",
            code="stale_installation",
            hint=install(),
        )
    return pack(found, directory, None if _is_recorded(found, package) else package)


def _is_recorded(found: Distribution, package: Path) -> bool:
    """Tell whether what runs is what was installed; else that only points to a source tree."""
    init = (package / "__init__.py").resolve()
    return any(
        file.name == "__init__.py" and Path(str(file.locate())).resolve() == init
        for file in found.files or ()
    )


def pack(found: Distribution, directory: Path, package: Path | None = None) -> Wheel:
    """Make the wheel of a distribution that pip has installed; ``package`` replaces its code.

    Raises:
        MachineError: it has no RECORD or lacks a file; ``directory`` cannot be written.
    """
    stem = _stem(found)
    try:
        files = _installed(found, stem) if package is None else _metadata(found) | _tree(package)
    except OSError as exc:
        raise _not_whole(found, f"{exc.filename}: {exc.strerror}") from exc
    head = files[f"{stem}.dist-info/WHEEL"].data.decode()
    own = f"{stem}.dist-info/RECORD"
    record = _record(files, own)
    path = directory / f"{stem}-{_tags(head)}.whl"
    with writing(directory):
        _zip(path, {**files, own: _File(record)})
    return Wheel(path, found.version, hashlib.sha256(record).hexdigest())


def _not_whole(found: Distribution, why: str) -> MachineError:
    name = found.metadata["Name"]
    return MachineError(
        f"no wheel can be made of the installed {name}: {why}",
        code="not_installed",
        hint=install(),
    )


def _stem(found: Distribution) -> str:
    """Return name and version as the wheel's name has them."""
    for listed in found.files or ():
        if listed.name == "WHEEL" and listed.parent.name.endswith(".dist-info"):
            return listed.parent.name.removesuffix(".dist-info")
    raise _not_whole(found, "pip has left no RECORD that names its WHEEL")


def _metadata(found: Distribution) -> dict[str, _File]:
    return {
        str(listed): _read(Path(str(listed.locate())))
        for listed in found.files or ()
        if listed.parts[0].endswith(".dist-info") and not _is_made(listed)
    }


def _installed(found: Distribution, stem: str) -> dict[str, _File]:
    """Return the files as they were in the wheel, by their place there."""
    ours = {entry.name for entry in found.entry_points if entry.group in SCRIPT_GROUPS}
    data = f"{stem}.data"
    files = {}
    for listed in found.files or ():
        if _is_made(listed):
            continue
        path = Path(str(listed.locate()))
        if ".." not in listed.parts:
            files[str(listed)] = _read(path)
            continue
        kind, where = _outside(listed)
        if kind == "data":
            files[f"{data}/data/{where}"] = _read(path)
        elif where not in ours:  # those are made anew wherever the wheel is installed
            files[f"{data}/scripts/{where}"] = _script(path)
    return files


def _is_made(path: PurePosixPath) -> bool:
    is_noted = path.name in NOTED and path.parent.name.endswith(".dist-info")
    return path.suffix == ".pyc" or is_noted


def _outside(listed: PurePosixPath) -> tuple[str, str]:
    """Return what a file outside of site-packages is: a script, or data below the prefix."""
    below = [part for part in listed.parts if part != ".."]
    if below[0] == "bin" and len(below) == 2:
        return "scripts", below[1]
    return "data", "/".join(below)


def _read(path: Path) -> _File:
    return _File(path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR))


def _script(path: Path) -> _File:
    """Return a script with the first line that lets an installer name its own Python there."""
    first, newline, rest = path.read_bytes().partition(b"\n")
    is_python = first.startswith(b"#!") and os.fsencode(sys.prefix) in first
    return _File((b"#!python" if is_python else first) + newline + rest, is_program=True)


def _tree(package: Path) -> dict[str, _File]:
    return {
        str(PurePosixPath(path.relative_to(package.parent))): _read(path)
        for path in package.rglob("*")
        if path.is_file() and _is_source(path.relative_to(package))
    }


def _is_source(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return not hidden and path.suffix != ".pyc" and not path.name.endswith("~")


def _tags(head: str) -> str:
    """Return the end of a wheel's name: its build and tags as its WHEEL says them."""
    lines = [line.partition(": ")[::2] for line in head.splitlines()]
    build = [value.strip() for key, value in lines if key == "Build"]
    tags = [value.strip().split("-") for key, value in lines if key == "Tag"]
    parts = [".".join(dict.fromkeys(column)) for column in zip(*tags, strict=True)]
    return "-".join([*build, *parts])


def _record(files: dict[str, _File], own: str) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows([where, *files[where].record] for where in sorted(files))
    rows.writerow([own, "", ""])
    return text.getvalue().encode()


def _zip(path: Path, files: dict[str, _File]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for where in sorted(files):
            info = zipfile.ZipInfo(where, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            mode = 0o755 if files[where].is_program else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(info, files[where].data)
