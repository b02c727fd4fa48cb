"""Runs on the node before anything else, sent through SSH: standard library, any Python 3.6.

It reads its request from stdin (a line with a length, then that much JSON), finds a Python that is
new enough, makes the directories, answers with one marked line and becomes the guard. The answer
begins on a line of its own with the request's marker: login shells may have talked before. A
request that only looks changes nothing, and ends with the answer; one that only wakes has none.

Whatever waits here for an owner who never speaks is ended by an alarm, which survives exec; the
guard turns it off once it has its start line.
"""

import glob
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from typing import Any

MAX_RUNTIME = 24  # as in rbee.home


class RefusedError(Exception):
    """What the owner is told instead of ``ready``."""

    def __init__(self, kind: Any, had: Any) -> None:
        super().__init__(kind)
        self.kind, self.had = kind, had


def read_request() -> Any:
    stdin = os.fdopen(0, "rb", 0, closefd=False)
    size, data = int(stdin.readline()), b""
    while len(data) < size:
        more = stdin.read(size - len(data))
        if not more:
            os._exit(2)
        data += more
    return json.loads(data.decode())


def answer(request: Any, kind: Any, facts: Any) -> None:
    line = f"\n{request['marker']} {kind} {json.dumps(facts)}\n"
    os.write(1, line.encode())


def find_python(request: Any, home: Any) -> Any:
    """Return the Python for the guard; ours if it will do."""
    minimum = tuple(request["minimum"])
    if request["python"]:
        asked = os.path.expanduser(request["python"])
        candidates = [shutil.which(asked) or asked]
    else:
        candidates = [sys.executable, os.path.join(home, "venv/bin/python")]
        candidates += filter(None, (shutil.which(f"python3.{n}") for n in range(14, 10, -1)))
    had = []
    for path in candidates:
        version = version_of(path)
        if version >= minimum:
            return path, version
        said = ".".join(map(str, version)) or "(does not run)"
        had.append(f"{path} {said}")
    raise RefusedError("python", "; ".join(had))


def version_of(path: Any) -> Any:
    if path == sys.executable:
        return tuple(sys.version_info[:3])
    code = "import sys; print(*sys.version_info[:3])"
    try:
        out = subprocess.check_output(
            [path, "-I", "-S", "-c", code], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return tuple(map(int, out.split()))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return ()


def find_program(name: Any) -> Any:
    path = os.path.expanduser(name)
    found = shutil.which(path)
    if not found:
        raise RefusedError("program", path)
    return os.path.abspath(found)


def find_home(given: Any) -> Any:
    root = os.path.expanduser(given or os.environ.get("RBEE_HOME") or "~/.rbee")
    return os.path.abspath(root)


def find_run(home: Any) -> Any:
    """Return the home's run directory; the same one as rbee.home finds here."""
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    fits = 0 < len(runtime) <= MAX_RUNTIME
    if fits and os.path.isdir(runtime) and os.access(runtime, os.W_OK):
        return os.path.join(runtime, "rbee-" + digest)
    return f"/tmp/rbee-{os.getuid()}-{digest}"


def find_version(program: Any) -> Any:
    """Return the rbee whose program this is, as its package says; "" if nobody knows."""
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    names = glob.glob(glob.escape(prefix) + "/lib/python3*/*-packages/rbee-*.dist-info")
    return os.path.basename(names[0])[5:-10] if len(names) == 1 else ""


def find_hive(run: Any) -> Any:
    """Return what the hive that an operator has started wrote about itself, and its token."""
    try:
        with open(os.path.join(run, "hive.json"), encoding="utf-8") as file:
            found = json.load(file)
        if found["boot_id"] != boot_id() or found["start_time"] != start_time(found["pid"]):
            return None
        with open(found["token_file"], encoding="ascii") as file:
            return {"run_file": found, "token": file.read().strip()}
    except FileNotFoundError as exc:
        if exc.filename == os.path.join(run, "hive.json"):
            return None
        raise
    except (ValueError, KeyError, TypeError):
        return None


def boot_id() -> Any:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def start_time(pid: Any) -> Any:
    """Return the start of a process in clock ticks since boot; 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return 0


def make_private(path: Any) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RefusedError("machine", f"{path} is not a directory of this user's")


def make_log(home: Any, name: Any) -> Any:
    path = os.path.expanduser(name)
    if "/" not in name:
        path = os.path.join(home, "logs", name)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(path, "ab") as log:  # fails here, while somebody listens, and not in the guard
        log.write(b"")
    return path


def make_run(home: Any, name: Any) -> Any:
    """Claim the run directory: whoever sweeps sees that we, soon the guard, use it."""
    path = name
    if "/" not in name:
        run = find_run(home)
        make_private(run)
        path = os.path.join(run, name)
    hidden = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
    os.mkdir(hidden, 0o700)
    try:
        with open(os.path.join(hidden, "owner"), "w") as file:
            file.write(f"{boot_id()} {os.getpid()} {start_time(os.getpid())}\n")
        os.rename(hidden, path)
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return path


def prepare(request: Any) -> Any:
    if not sys.platform.startswith("linux"):
        raise RefusedError("machine", f"it runs {sys.platform}, the guards need Linux")
    os.environ.update(request["env"])
    home = os.environ["RBEE_HOME"] = find_home(request["home"])
    python, version = find_python(request, home)
    facts = {
        "python": python,
        "version": list(version),
        "home": home,
        "address": address(),
        "program": find_program(request["program"]) if request["program"] else python,
        "log": make_log(home, request["log"]) if request["log"] else "/dev/null",
    }
    facts["run_dir"] = make_run(home, request["run_dir"]) if request["run_dir"] else ""
    return facts


def address() -> Any:
    """Return where we are reached, as this machine sees it; "" if SSH does not tell."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else ""


def look(request: Any) -> Any:
    """Say what a hive would find here; a missing program is "", not a refusal."""
    os.environ.update(request["env"])
    home = find_home(request["home"])
    python, version = find_python(request, home)
    program = shutil.which(os.path.expanduser(request["program"])) or ""
    return {
        "python": python,
        "version": list(version),
        "home": home,
        "program": program,
        "rbee": find_version(program) if program else "",
        "hive": find_hive(find_run(home)),
    }


def become_guard(python: Any, request: Any, *words: Any) -> None:
    os.execv(python, [python, "-I", "-S", "-c", request["guard"], *words])


def main() -> None:
    # What we read has been sent together with this program. With the alarm before it, and the
    # lease after it, a node that is cut off meanwhile is clean within the lease and 8 s.
    signal.setitimer(signal.ITIMER_REAL, 3)
    request = read_request()
    signal.setitimer(signal.ITIMER_REAL, request["patience"])
    umask = os.umask(0o077)
    if not request["look"]:  # held until the guard can clean up what is claimed here
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
    try:
        if request["wake"]:
            become_guard(find_python(request, find_home(request["home"]))[0], request, "wake")
        facts = look(request) if request["look"] else prepare(request)
    except RefusedError as refused:
        answer(request, "refused", {"kind": refused.kind, "had": refused.had})
        return
    except OSError as exc:
        had = f"{exc.filename}: {exc.strerror}"
        answer(request, "refused", {"kind": "machine", "had": had})
        return
    os.umask(umask)
    answer(request, "ready", facts)
    if request["look"]:
        return
    os.environ["RBEE_CLAIMED"] = facts["run_dir"]  # the guard's to remove if it gets no plan
    if request["bare"]:
        os.dup2(2, 3, inheritable=True)  # for the command: the guard's own goes to its log
    become_guard(facts["python"], request)


if __name__ == "__main__":
    main()
