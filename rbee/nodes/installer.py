"""Runs on the node, sent through SSH: puts rbee into a virtual environment there.

Standard library, Python 3.11. It gets a verb and an order as JSON, and says one JSON object a line;
the last one is ``{"done": …}`` or ``{"failed": …}``.

An environment cannot be moved, so each is made in ``venvs/`` beside the symbolic link that names
the one in use, and the link is replaced at the very end. Whatever ends us before that leaves the
link as it was; what was half made is removed by the next installation. A lock keeps two apart.
The environment that was in use before stays until the installation after: where machines share a
home, another one may still run from it, which nothing here can tell.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import re
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "rbee-install.json"
USUAL = "~/.rbee/venv"
GONE = ".gone-"
OLD = 3600.0  # seconds after which nobody comes back for a wheel that he has copied
EVERY = 0.5  # seconds between two looks at a download
TAIL = 12
AGAIN = "WARNING: Retrying"
DOWNLOADING = re.compile(r"Downloading (\S+) \(([\d.]+) ?([kMG]?)B\)")
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
FULL = re.compile("No space left|Disk quota exceeded")
NONE_FOUND = re.compile("No matching distribution|Could not find a version")

Order = dict[str, Any]


class FailedError(Exception):
    """What the owner is told instead of ``done``."""

    def __init__(self, code: str, message: str, *, log: str = "", path: str = "") -> None:
        super().__init__(message)
        self.facts = {"code": code, "message": message, "log": log, "path": path}


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


# where things are ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """The link that names the environment in use, and the directories beside it."""

    link: Path

    @property
    def venvs(self) -> Path:
        return self.link.parent / "venvs"

    @property
    def wheelhouse(self) -> Path:
        return self.link.parent / "wheelhouse"

    @property
    def current(self) -> Path:
        return self.link.resolve()


def find_place(order: Order) -> Place:
    """Return the place whose environment has its programs where the node's entry says."""
    programs = Path(os.path.normpath(Path(order["rbee_path"]).expanduser()))
    if programs.name != "bin":
        raise FailedError("foreign", f"{programs} is not the bin of a virtual environment")
    place = Place(programs.parent)
    # only what nobody else would have put there may be moved away: /usr is at such a place, too
    path = str(place.link) if place.link == Path(USUAL).expanduser() else ""
    if place.link.is_symlink():
        if place.current.parent != place.venvs.resolve():
            why = f"{place.link} leads to {place.current}, which is not of our making"
            raise FailedError("foreign", why, path=path)
    elif place.link.exists():
        raise FailedError("foreign", f"{place.link} is not of our making", path=path)
    return place


def read_marker(venv: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((venv / MARKER).read_text()))
    except (OSError, ValueError):
        return {}


def write_marker(venv: Path, facts: dict[str, Any]) -> None:
    new = venv / f"{MARKER}.new"
    new.write_text(json.dumps(facts))
    new.replace(venv / MARKER)


# looking ------------------------------------------------------------------------------------------
def look(order: Order) -> dict[str, Any]:
    """Tell what there is; unless that is what is wanted, make room for what is to be copied."""
    place = find_place(order)
    extra = order["extra"] or ("cuda" if has_gpu() else "cpu")
    if not order["force"] and (there := find_there(place, order, extra)):
        return {"there": there}
    for path in (place.link.parent, place.venvs, place.wheelhouse):
        if path != place.wheelhouse or order["wheels"] is not None:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(place):
        clean(place)  # before its room is counted
    touch(place.wheelhouse, order["wheels"] or ())
    return {
        "there": None,
        "extra": extra,
        "free": shutil.disk_usage(place.venvs).free,
        "venvs": str(place.venvs),
        "wheelhouse": str(place.wheelhouse),
        "wheels": {path.name: path.stat().st_size for path in place.wheelhouse.glob("*.whl")},
    }


def has_gpu() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    try:
        said = subprocess.run(["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError:
        return False
    return said.returncode == 0 and b"GPU 0" in said.stdout


def find_there(place: Place, order: Order, extra: str) -> dict[str, Any] | None:
    """Return the environment in use if it is the one that is wanted and works."""
    marker = read_marker(place.link)
    wanted = {"ready": True, "digest": order["digest"], "extra": extra}
    if order["python"]:
        wanted["python"] = python()
    if any(marker.get(name) != value for name, value in wanted.items()):
        return None
    try:
        return result(place.current, marker, detect(place.current))
    except FailedError:
        return None


def python() -> str:
    return os.path.realpath(sys.executable)


def result(venv: Path, marker: dict[str, Any], capabilities: Any) -> dict[str, Any]:
    found = {"venv": str(venv), "capabilities": capabilities}
    return found | {name: marker[name] for name in ("extra", "python")}


def detect(venv: Path) -> Any:
    """Return what the rbee in an environment says about the node."""
    program = venv / "bin" / "rbee-hive"
    try:
        done = subprocess.run(
            [program, "detect"], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as exc:
        raise FailedError("broken", f"{program}: {exc.strerror}") from exc
    try:
        if done.returncode == 0:
            return json.loads(done.stdout)
    except ValueError:
        pass
    said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-TAIL:])
    raise FailedError("broken", f"{program} detect ended with code {done.returncode}", log=said)


# installing ---------------------------------------------------------------------------------------
def install(order: Order) -> dict[str, Any]:
    """Make a new environment and put it in use."""
    place = find_place(order)
    with locked(place):
        if not order["force"] and (there := find_there(place, order, order["extra"])):
            return there  # whoever had the lock before us has made it
        if order["wheels"] is not None:
            remove_old(place.wheelhouse, set(order["wheels"]))
        previous, venv = place.current, begin(place, order)
        try:
            made = make(venv, place, order)
        except Exception:
            shutil.rmtree(venv, ignore_errors=True)  # it may be all that fills the disk
            raise
        return {**made, "kept": clean(place, previous)}


@contextmanager
def locked(place: Place) -> Iterator[None]:
    with (place.venvs / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(step="wait", text="until another installation there has ended")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def begin(place: Place, order: Order) -> Path:
    """Make the new directory; from its first file on it is known as half made."""
    venv = place.venvs.resolve() / f"{order['version']}-{secrets.token_hex(4)}"
    venv.mkdir(0o700)
    facts = {name: order[name] for name in ("digest", "extra", "version")}
    write_marker(venv, {**facts, "link": str(place.link), "python": python()})
    return venv


def make(venv: Path, place: Place, order: Order) -> dict[str, Any]:
    fill(venv, place, order)
    say(step="check", text="rbee-hive detect")
    capabilities = detect(venv)
    marker = read_marker(venv) | {"ready": True}
    write_marker(venv, marker)
    point(place.link, venv)
    return result(venv, marker, capabilities)


def point(link: Path, venv: Path) -> None:
    """Have the link name another environment, in one step."""
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(Path("venvs", venv.name))
    new.replace(link)


# what is not needed any more ----------------------------------------------------------------------
def clean(place: Place, previous: Path | None = None) -> list[str]:
    """Remove our environments but the one in use and the one before, if that is given.

    Returns those that something still runs from.
    """
    kept = []
    for path in place.venvs.resolve().iterdir():
        if path.name.startswith(".rbee-") and time.time() - path.stat().st_mtime > OLD:
            path.unlink()
        elif path == place.current or not is_left(place, path):
            continue
        elif is_used(path):
            kept.append(str(path))
        elif path != previous:
            remove(path)
    return kept


def is_left(place: Place, path: Path) -> bool:
    """Tell whether it is an environment of this place: somebody's own directory stays."""
    if not path.is_dir():
        return False
    is_unmarked = path.name.startswith(GONE) or is_empty(path)
    return is_unmarked or read_marker(path).get("link") == str(place.link)


def is_empty(path: Path) -> bool:
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def is_used(venv: Path) -> bool:
    """Tell whether a process has a file of it mapped: what it imports later must be there."""
    mark = os.fsencode(venv) + b"/"
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if mark in maps.read_bytes():
                return True
        except OSError:  # it has ended, or is somebody else's
            continue
    return False


def remove(venv: Path) -> None:
    say(step="remove", text=f"{venv.name}, which nothing uses")
    gone = venv.with_name(GONE + secrets.token_hex(4))
    try:
        venv.rename(gone)  # never half there under its name
    except OSError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def touch(wheelhouse: Path, wheels: Iterable[str]) -> None:
    """Have the wheels that are wanted and there count as new: they are not copied again."""
    for name in wheels:
        with suppress(OSError):  # it is not there, or not ours to touch
            os.utime(wheelhouse / name)


def remove_old(wheelhouse: Path, wheels: set[str]) -> None:
    """Remove what nobody wants any more; another installation may just have copied the rest."""
    for path in wheelhouse.iterdir():
        is_old = time.time() - path.stat().st_mtime > OLD
        if is_old and path.is_file() and path.name not in wheels:
            path.unlink()


# pip ----------------------------------------------------------------------------------------------
def fill(venv: Path, place: Place, order: Order) -> None:
    """Make the environment and install into it; all that is temporary lies in it as well."""
    temporary = venv / "tmp"
    temporary.mkdir(0o700)
    os.environ["TMPDIR"] = str(temporary)  # a pip that is killed leaves gigabytes there
    source = []
    if order["wheels"] is not None:
        source = ["--no-index", "--find-links", str(chosen(place, order["wheels"], temporary))]
    say(step="venv", text=f"with Python {sys.version.partition(' ')[0]}")
    make_venv(venv, source)
    wheel = temporary / order["name"]
    shutil.move(order["wheel"], wheel)
    extra = "" if order["extra"] == "none" else f"[{order['extra']}]"
    say(step="install", text=f"rbee{extra} {order['version']}")
    pip = [str(venv / "bin" / "python"), "-I", "-m", "pip"]
    if order["torch"]:
        install_torch(pip, source, **order["torch"])
    pip_install(pip, source, f"{wheel}{extra}")
    del os.environ["TMPDIR"]
    shutil.rmtree(temporary, ignore_errors=True)


def chosen(place: Place, wheels: list[str], temporary: Path) -> Path:
    """Make a directory of our owner's wheels alone: pip chooses among all that it finds."""
    directory = temporary / "wheels"
    directory.mkdir()
    for name in wheels:
        (directory / name).symlink_to(place.wheelhouse.resolve() / name)
    return directory


def make_venv(venv: Path, source: list[str]) -> None:
    """Make an environment with pip in it: that of this Python, else the one of the index."""
    bundled = importlib.util.find_spec("ensurepip")
    if not bundled and not importlib.util.find_spec("pip"):
        raise FailedError("no_pip", f"{sys.executable} has neither ensurepip nor pip")
    isolated = [sys.executable, "-I", "-m"]
    inner = str(venv / "bin" / "python")
    run_told([*isolated, "venv", "--without-pip", str(venv)], "venv")
    if bundled:  # not left to venv, which swallows what it says
        run_told([inner, "-I", "-m", "ensurepip", "--upgrade", "--default-pip"], "venv")
    else:
        pip_install([*isolated, "pip", "--python", inner], source, "pip")


def install_torch(pip: list[str], source: list[str], requirement: str, index: str) -> None:
    """Install the CPU's build of torch; PyPI itself has none."""
    try:
        pip_install(pip, source, requirement)
    except FailedError as failed:
        if source or not NONE_FOUND.search(failed.facts["log"]):
            raise
        say(line=f"pip found no {requirement}, trying {index}")
        pip_install(pip, ["--extra-index-url", index], requirement)


def pip_install(pip: list[str], source: list[str], requirement: str) -> None:
    flags = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    run_told([*pip, "install", *flags, *source, requirement], "pip")


# what a child says --------------------------------------------------------------------------------
def run_told(argv: list[str], what: str) -> None:
    """Run a program and tell its lines on; raise with the last ones if it fails."""
    tail: deque[str] = deque(maxlen=TAIL)
    full = ""
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        assert child.stdout is not None
        for line in lines(child.stdout.fileno()):
            if line is None:
                tell_download(tail[-1] if tail else "")
            elif line.strip():
                note(tail, line.strip())
                full = tail[-1] if FULL.search(line) else full
    if child.returncode != 0:
        why = full or f"{what} ended with code {child.returncode}"
        raise FailedError("full" if full else what, why, log="\n".join(tail))


def note(tail: deque[str], line: str) -> None:
    if tail and tail[-1].startswith(AGAIN) and line.startswith(AGAIN):
        tail.pop()
    tail.append(line)
    say(line=line)


def lines(fd: int) -> Iterator[str | None]:
    """Yield what is written, line by line, and None while nothing is."""
    rest = b""
    while True:
        if not select.select([fd], [], [], EVERY)[0]:
            yield None
            continue
        data = os.read(fd, 65536)
        if not data:
            break
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def tell_download(line: str) -> None:
    """Tell how much of pip's current download is there: not every pip says it itself."""
    if match := DOWNLOADING.search(line):
        whole = float(match[2]) * UNITS[match[3]]
        say(line=line, share=min(newest_size(Path(os.environ["TMPDIR"])) / max(whole, 1.0), 1.0))


def newest_size(temporary: Path) -> int:
    """Return the size of the file that pip has written to last; it keeps those before."""
    try:
        found = [path.stat() for path in temporary.glob("pip-unpack-*/*")]
    except OSError:  # one has gone meanwhile
        return 0
    return max(((stat.st_mtime, stat.st_size) for stat in found), default=(0.0, 0))[1]


def main(verb: str, order: Order) -> int:
    try:
        say(done={"look": look, "install": install}[verb](order))
    except FailedError as failed:
        say(failed=failed.facts)
    except OSError as exc:
        code = "full" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else "write"
        say(failed=FailedError(code, f"{exc.filename or 'a file'}: {exc.strerror}").facts)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
