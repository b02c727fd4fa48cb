"""``$RBEE_HOME`` and its run directory: where things are, made when needed, private."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

from rbee.errors import MachineError
from rbee.paths import full_path

# Unix socket paths end at 107 bytes; vLLM's are 37 below a worker's directory, which lies in its
# hive's, in its queen's (10 each), in the home's (14).
MAX_RUNTIME = 24

MAX_TOKEN = 512
MAX_TOKEN_FILE = 4096
_TOKEN = re.compile(rf"[!-~]{{1,{MAX_TOKEN}}}")


@attrs.frozen
class Home:
    """One rbee installation of one user.

    ``root`` may be on NFS and shared by nodes; ``run`` is local to this machine: sockets, locks
    and the journal of owned processes live there, and its path is short (unix sockets end at 107
    bytes).
    """

    root: Path
    run: Path

    @property
    def config_file(self) -> Path:
        return self.root / "config.toml"

    @property
    def queen_db(self) -> Path:
        return self.root / "queen.db"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def token_file(self) -> Path:
        return self.root / "token"

    @property
    def queen_file(self) -> Path:
        return self.run / "queen.json"

    @property
    def hive_file(self) -> Path:
        return self.run / "hive.json"

    def log_file(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def short_name(name: str) -> str:
    """Return a directory name for an id: ``worker-3f9a1c2e`` becomes ``w3f9a1c2e``."""
    kind, _, rest = name.partition("-")
    return kind[:1] + rest


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    return full_path(environ.get("RBEE_HOME") or "~/.rbee")


def find_home(root: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Home:
    """Name the home without touching the disk."""
    path = full_path(root) if root else default_root(environ)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    fits = 0 < len(runtime) <= MAX_RUNTIME
    if fits and Path(runtime).is_dir() and os.access(runtime, os.W_OK):
        return Home(path, Path(runtime) / f"rbee-{digest}")
    return Home(path, Path(f"/tmp/rbee-{os.getuid()}-{digest}"))


def open_home(root: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Home:
    """Find the home and make what is missing of it.

    Raises:
        MachineError: it cannot be written, or somebody else owns the run directory.
    """
    home = find_home(root, environ)
    with writing(home.root):
        for path in (home.root, home.models, home.logs, home.run):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(home.run)
    _link_run(home)
    return home


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below ``path`` into an error that says what to do."""
    try:
        yield
    except OSError as exc:
        raise MachineError(
            f"cannot write {exc.filename or path}: {exc.strerror} "
            f"(rbee needs a writable home with free space; it is {path})",
            code="home_not_writable",
            hint="RBEE_HOME=~/rbee-home rbee-keeper status   # another directory, with space",
        ) from exc


def _check_private(run: Path) -> None:
    found = run.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise MachineError(
            f"{run} is not a directory of yours (uid {os.getuid()}, found uid {found.st_uid})",
            code="run_dir_not_private",
            hint=f"ls -ld {shlex.quote(str(run))}",
        )
    if found.st_mode & 0o077:
        run.chmod(0o700)


def _link_run(home: Home) -> None:
    """Keep ``$RBEE_HOME/run`` pointing at the run directory, for people."""
    link = home.root / "run"
    if link.is_symlink() and link.readlink() == home.run:
        return
    with writing(home.root):
        temporary = home.root / f".run-{secrets.token_hex(4)}"
        temporary.symlink_to(home.run)
        try:
            temporary.replace(link)
        except OSError:
            temporary.unlink()
            raise


def read_token(home: Home) -> str:
    """Return the operator's token, made at first use (0600).

    Raises:
        MachineError: it cannot be read or made, or the file is empty.
    """
    if not home.token_file.exists():
        _make_token(home.token_file)
    return read_token_file(home.token_file)


def _make_token(path: Path) -> None:
    """Make the token unless a daemon that starts beside us was quicker: both must read one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_atomic(temporary, secrets.token_hex(24) + "\n")
    with writing(path.parent):
        try:
            path.hardlink_to(temporary)  # unlike a rename it fails where there is one already
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def choose_token(home: Home, named: Path | None) -> tuple[Path, str]:
    """Return the token file that ``--token-file`` names, else the home's, and the token in it."""
    if named is None:
        return home.token_file, read_token(home)
    path = full_path(named)
    return path, read_token_file(path)


def read_token_file(path: Path) -> str:
    """Return what a token file holds.

    Raises:
        MachineError: it cannot be read, is open to others (as with ssh's keys, a file that is not
            ours is its owner's to judge), or holds something else than one token.
    """
    place = shlex.quote(str(path))
    try:
        with path.open("rb") as file:
            _refuse_open(path, os.fstat(file.fileno()))
            token = file.read(MAX_TOKEN_FILE).strip()
    except OSError as exc:
        raise MachineError(
            f"cannot read the token file {path}: {exc.strerror}", hint=f"ls -l {place}"
        ) from exc
    if not token:
        raise MachineError(
            f"the token file {path} is empty",
            hint=f"rm {place}   # a new token is made at the next start",
        )
    return check_token(token.decode("latin-1"), f"the token file {path}", hint=f"wc {place}")


def _refuse_open(path: Path, found: os.stat_result) -> None:
    if found.st_uid == os.getuid() and found.st_mode & 0o077:
        raise MachineError(
            f"the token file {path} is open to others (mode {found.st_mode & 0o777:04o}); "
            "only you may read it (mode 0600)",
            code="token_file_open",
            hint=f"chmod 600 {shlex.quote(str(path))}",
        )


def check_token(token: str, where: str, *, hint: str) -> str:
    """Return a token that can stand in a request's head; the error does not quote it.

    Raises:
        MachineError: it is empty, too long, or holds a space or anything beyond ASCII.
    """
    if not _TOKEN.fullmatch(token):
        raise MachineError(
            f"{where} holds no token: one word of at most {MAX_TOKEN} printable ASCII characters "
            f"is needed, got {len(token)} characters",
            code="bad_token",
            hint=hint,
        )
    return token


def write_atomic(path: Path, text: str) -> None:
    """Write a private file so that readers see the old or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path.parent):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
