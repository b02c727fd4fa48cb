"""Keep one command's whole process tree, and end it when its owner, its lease or itself ends.

This file runs by itself on a bare node (standard library only, Linux):

    python3 -I -S guard.py < lifeline

The lifeline is stdin, a line protocol: first ``start {json}`` (see `Plan`), then ``beat N`` at
least once per lease, ``stop`` or end of file to end. An unknown or overlong line ends it as well.
The command gets a pipe from the guard as its own stdin, on which the plan's ``first`` line and the
beats are passed on: guards nest, and a guarded guard needs no second protocol.

The guard is a child subreaper, so whatever the tree forks, re-sessions or orphans stays below it.
At the end: TERM to the command, a grace, then STOP and KILL to every descendant until none is
left, then the run directory is removed. A process is only signalled through a pidfd whose start
time was compared, never by a bare pid. The guard never blocks: a full pipe loses a beat, and it
logs to a file.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
MAX_LINE = 64 * 1024
LOG_CAP = 16 << 20
RECORD_EVERY = 1.0
SHM_EVERY = 5.0
WAKE_EVERY = 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GONE = (FileNotFoundError, ProcessLookupError, PermissionError)  # what /proc says of such a process
# Shared memory that engines make for themselves; any other file there is somebody's data.
SHM_NAMES = ("psm_", "sem.", "torch_", "nccl-", "cuda.shm.", "vllm", "VLLM", "rbee")

libc = ctypes.CDLL(None, use_errno=True)


# identity of processes ------------------------------------------------------------------------
def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _stat(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def start_time(pid: int) -> int:
    """Return the process's start in clock ticks since boot; 0 if it is gone or a zombie."""
    try:
        fields = _stat(pid)
    except OSError:
        return 0
    return 0 if _has_ended(fields) else int(fields[19])


def _has_ended(fields: list[bytes]) -> bool:
    # A main thread that has ended shows as a zombie as well, while other threads run on.
    return fields[0] in (b"Z", b"X") and int(fields[17]) <= 1


def is_hidden(pid: int) -> bool:
    """Tell whether a process is there that /proc does not show us (hidepid, no descriptors)."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as exc:
        return exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    try:
        _stat(pid)
        return False
    except OSError:  # unless it has ended just now
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(pidfd)


def descendants(roots: dict[int, int]) -> dict[int, int]:
    """Return {pid: start time} of everything below ``roots``, given likewise; no zombies.

    A pid may have come round since a root was noted, or while we look: what is only below such a
    pid is not in the result.
    """
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = _stat(int(entry))
        except GONE:  # any other failure must not pass for "nothing is there"
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = {}, list(roots.items())
    while todo:
        pid, start = todo.pop()
        for child, (began, alive) in _confirmed(parents.pop(pid, []), pid, start).items():
            todo.append((child, began))  # a zombie may still be a parent while it is reaped
            if alive:
                found[child] = began
    return found


def offspring(pid: int, start: int) -> dict[int, int]:
    """Return {pid: start time} of the living children of exactly the process given."""
    below = _confirmed(children(pid), pid, start)
    return {child: began for child, (began, alive) in below.items() if alive}


def _confirmed(pids: list[int], parent: int, start: int) -> dict[int, tuple[int, bool]]:
    """Return those of ``pids`` that are children of that very parent: {pid: (start, is alive)}.

    The parent is looked at last: it was itself before, so it was all the time.
    """
    found = {}
    for pid in pids:
        try:
            fields = _stat(pid)
        except OSError:
            continue
        if int(fields[1]) == parent:
            found[pid] = (int(fields[19]), not _has_ended(fields))
    try:
        return found if int(_stat(parent)[19]) == start else {}
    except OSError:
        return {}


def children(pid: int) -> list[int]:
    """Return the pids of ``pid``'s children; cheap, and empty if it is gone."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
        except OSError:  # this thread has ended; its children are another thread's now
            pass
    return found


def send_signal(pid: int, start: int, number: int) -> bool:
    """Signal exactly the process that started at ``start``; False if it is not there any more."""
    if start <= 0:  # it was gone when we looked
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Compared after the pidfd was opened: a pid used again has another start time.
        return start_time(pid) == start and signal_pidfd(pidfd, number)
    finally:
        os.close(pidfd)


def signal_pidfd(pidfd: int, number: int) -> bool:
    """Signal the process that a pidfd means, whatever its pid is by now: no other way is used.

    Whoever opened it has compared the start time, or was the parent and had not reaped it yet.
    """
    try:
        signal.pidfd_send_signal(pidfd, number)
        return True
    except OSError:
        return False


def die_with_parent(number: int, parent: int) -> None:
    """Arm PR_SET_PDEATHSIG; exit if the parent we were told of is already gone."""
    libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def held_interrupt():  # type: ignore[no-untyped-def]
    """Let SIGINT wait in what is started in here, until it calls `release_interrupt`.

    A Python that is interrupted while it starts fails anywhere, in any words.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_interrupt() -> None:
    """Take the SIGINT that has waited: our own handlers are there now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def set_oom_score(score: int) -> None:
    """Set how gladly the OOM killer takes this process; -1000 … 1000, 0 is the usual."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(score))
    except OSError:
        pass


def become_subreaper() -> None:
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_title(title: str) -> None:
    """Set the name that ps shows, both the short and the long one, without any package."""
    libc.prctl(PR_SET_NAME, title.encode(), 0, 0, 0)
    try:
        fields = _stat(os.getpid())
        begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
    except (OSError, ValueError, IndexError):
        return
    if end - begin > len(title):
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, title.encode(), len(title))


def close_all_but(keep: list[int]) -> None:
    """Close every file descriptor above 2 except ``keep``: fork knows no close-on-exec."""
    low = 3
    for fd in sorted(fd for fd in keep if fd > 2):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


# what leaves traces ---------------------------------------------------------------------------
def shared_memory_of(pid: int) -> set[str]:
    """Return the /dev/shm files that a process has mapped: a killed one cannot unlink them."""
    found = set()
    try:
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
            for line in file:
                at = line.find("/dev/shm/")
                path = line[at:].rstrip("\n")
                if at >= 0 and is_engines_shm(path):
                    found.add(path)
    except OSError:
        pass
    return found


def is_engines_shm(path: str) -> bool:
    """Tell an engine's own segment from a file, a model say, that its user keeps in memory."""
    name = path.removeprefix("/dev/shm/")
    return name != path and name.startswith(SHM_NAMES) and "/" not in name and " " not in name


def remove_tree(path: str) -> None:
    """Remove a directory of ours and all in it; what is already gone is fine."""
    if os.path.islink(path):
        _unlink(path)
        return
    try:
        entries = list(os.scandir(path))
    except NotADirectoryError:
        _unlink(path)
        return
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            _unlink(entry.path)
    try:
        os.rmdir(path)
    except OSError:
        pass


def remove_run_file(path: str, pid: int) -> None:
    """Remove the run file that process ``pid`` left, unless another daemon has taken its place.

    A living daemon holds the lock beside its run file, so the check cannot race with a new one.
    """
    try:
        lock = os.open(
            path.rpartition(".")[0] + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(path) as file:
            if json.load(file).get("pid") == pid:
                os.unlink(path)
    except (OSError, ValueError, AttributeError):
        pass
    finally:
        os.close(lock)


def cap_log(path: str) -> None:
    """Keep the log that stderr appends to under its cap: its newest content moves to ``.1``.

    No more than that is copied: whoever floods the log is quicker, and must not keep a guard from
    its watch.
    """
    try:
        size = os.fstat(2).st_size
        if size > LOG_CAP:
            with open(path, "rb") as old, open(path + ".1", "wb") as new:
                old.seek(size - LOG_CAP)
                new.write(old.read(LOG_CAP))
            os.ftruncate(2, 0)
    except OSError:
        pass


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


# the guard ------------------------------------------------------------------------------------
class Plan:
    """What a guard is told in its ``start`` line.

    argv, env: the command and what its environment has beyond the guard's own.
    first: the line to send to the command at once, "" for none.
    lease: seconds without a beat that end the tree; 0 = none. clock: boottime for owners on
        another machine (a lease goes on while this one sleeps), monotonic for local ones.
    grace: seconds between TERM and KILL.
    record: directory for ``guard-<pid>.json``, the journal entry of this tree.
    remove: paths removed when nothing is left. run_file: removed if it is the command's.
    orphaned: paths that go as well if the process ``owner`` (pid, start time) is gone by then, who
        would have removed them.
    log: file for the guard's and the command's stderr, "" to keep what the guard has.
    parent: arm PR_SET_PDEATHSIG (TERM) towards this pid, 0 = no.
    die_with_guard: whether the command, whatever it is, has PR_SET_PDEATHSIG (KILL) towards its
        guard. Not for one that has something to clean and hears of it by its lifeline's end.
    hold_interrupt: whether SIGINT waits until the command calls `release_interrupt`.
    inner: whether it was started by another guard, which is woken at the end: nobody else could.
    adopt_grace: seconds that an orphan adopted while the command runs may live; 0 = till the end.
    name: what log lines call this guard. cap_log: whether it keeps the log short.
    """

    def __init__(self, given: dict) -> None:  # type: ignore[type-arg]
        self.argv: list[str] = list(given.get("argv", ()))
        self.env: dict[str, str] = dict(given.get("env", {}))
        self.first: str = given.get("first", "")
        self.lease = float(given.get("lease", 0))
        self.clock: str = given.get("clock", "monotonic")
        self.grace = float(given.get("grace", 5))
        self.record: str = given.get("record", "")
        self.remove: list[str] = list(given.get("remove", ()))
        self.orphaned: list[str] = list(given.get("orphaned", ()))
        self.owner, self.owner_start = map(int, given.get("owner", (0, 0)))
        self.run_file: str = given.get("run_file", "")
        self.log: str = given.get("log", "")
        self.parent = int(given.get("parent", 0))
        self.die_with_guard = bool(given.get("die_with_guard", False))
        self.inner = bool(given.get("inner", False))
        self.adopt_grace = float(given.get("adopt_grace", 0))
        self.hold_interrupt = bool(given.get("hold_interrupt", False))
        self.name: str = given.get("name", "guard")
        self.cap_log = bool(given.get("cap_log", True))

    def now(self) -> float:
        boottime = self.clock == "boottime"
        return time.clock_gettime(time.CLOCK_BOOTTIME if boottime else time.CLOCK_MONOTONIC)


class Lines:
    """Split what arrives on the lifeline into lines."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > MAX_LINE:
            lines.append(b"overlong")
            self.rest = b""
        return [line.decode("utf-8", "replace") for line in lines]


class Guard:
    """One guarded tree: `run` returns when nothing of it is left."""

    def __init__(self, plan: Plan, lifeline: int) -> None:
        self.plan = plan
        self.lifeline = lifeline
        self.me = (os.getpid(), start_time(os.getpid()))
        self.outer = os.getppid() if plan.inner else 0
        self.outer_start = start_time(self.outer)
        self.child = 0
        self.child_start = 0
        self.child_in = -1  # write end of the command's lifeline
        self.status: int | None = None
        self.why = ""
        self.kill_at = 0.0
        self.last_beat = plan.now()
        self.lines = Lines()
        self.shm: set[str] = set()
        self.adopted: dict[int, float] = {}
        self.recorded = ""
        self.complaint = ""
        self.record_path = ""

    # life ------------------------------------------------------------------------------------
    def run(self, spawn) -> int:  # type: ignore[no-untyped-def]
        """Start the command with ``spawn(stdin_fd) -> pid``, keep it, return its exit code."""
        wakeup = self._catch_signals()
        become_subreaper()
        if self.plan.parent:
            die_with_parent(signal.SIGTERM, self.plan.parent)
        reader, self.child_in = os.pipe()
        os.set_blocking(self.child_in, False)
        try:
            self.child = spawn(reader)
            os.close(reader)
            self._keep(wakeup)
        finally:
            self._finish()
        return self.status if self.status is not None else 137

    def _keep(self, wakeup: int) -> None:
        """Watch the command; whatever goes wrong in here, the tree must be ended."""
        try:
            self.child_start = start_time(self.child)
            self._write_record()
            if self.plan.first:
                self._pass_on(self.plan.first)
            self._watch(wakeup)
        except Exception as exc:
            self._log(f"cannot go on watching, killing: {exc!r}")

    def _catch_signals(self) -> int:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # held until we can clean
        return reader

    def _watch(self, wakeup: int) -> None:
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        poll.register(self.lifeline, select.POLLIN)
        watching, next_record, next_shm = True, 0.0, 0.0
        self._reap()  # it may have died before the handler was there
        while self.status is None:
            ready = dict(poll.poll(int(self._timeout() * 1000) + 1))
            if wakeup in ready:
                self._on_signals(os.read(wakeup, 4096))
            if self.lifeline in ready:
                self._on_lifeline()
            self._check_lease()
            if self.why and watching:
                poll.unregister(self.lifeline)
                watching = False
                self._ask_to_end()
            now = self.plan.now()
            if self.kill_at and now >= self.kill_at:
                self._log("grace is over, killing")
                return
            if self.kill_at:  # whoever is frozen only now would sleep through his grace
                send_signal(self.child, self.child_start, signal.SIGCONT)
            if now >= next_record:
                next_record = now + RECORD_EVERY
                self._adopt(now)
                self._write_record()
                if self.plan.log and self.plan.cap_log:
                    cap_log(self.plan.log)
            if now >= next_shm:
                next_shm = now + SHM_EVERY
                self._note_shared_memory(self._tree())

    def _timeout(self) -> float:
        now, limit = self.plan.now(), RECORD_EVERY
        if self.kill_at:
            limit = min(limit, WAKE_EVERY, self.kill_at - now)
        elif self.plan.lease and not self.why:
            limit = min(limit, self.last_beat + self.plan.lease - now)
        return max(limit, 0)

    def _on_signals(self, numbers: bytes) -> None:
        self._reap()
        for number in numbers:
            if number in STOP_SIGNALS and not self.why:
                self.why = signal.Signals(number).name

    def _on_lifeline(self) -> None:
        try:
            data = os.read(self.lifeline, 65536)
        except BlockingIOError:
            return
        except OSError as exc:
            data = b""
            self._log(f"lifeline: {exc}")
        if not data:
            self.why = self.why or "lifeline closed"
        self.take(self.lines.feed(data))

    def take(self, lines: list[str]) -> None:
        for line in lines:
            if line.startswith("beat "):
                self.last_beat = self.plan.now()
                self._pass_on(line)
            elif line == "stop":
                self.why = self.why or "asked to"
            else:
                self.why = self.why or f"unknown line {line[:40]!r}"

    def _check_lease(self) -> None:
        lease = self.plan.lease
        if lease and not self.why and self.plan.now() - self.last_beat >= lease:
            self.why = f"lease over ({lease:g} s without a beat)"

    # the end ---------------------------------------------------------------------------------
    def _ask_to_end(self) -> None:
        self._log(f"stopping: {self.why}")
        self._note_shared_memory(self._tree())  # TERM may end it without its own cleaning
        self.kill_at = self.plan.now() + self.plan.grace
        self._pass_on("stop")
        os.close(self.child_in)
        self.child_in = -1
        send_signal(self.child, self.child_start, signal.SIGTERM)
        send_signal(self.child, self.child_start, signal.SIGCONT)  # a frozen one hears it as well

    def _finish(self) -> None:
        killed = self._kill_all()
        self._log(f"command ended with {self.status}, {killed} more killed, why: {self.why or '-'}")
        for path in self.shm:
            _unlink(path)
        for path in self.plan.remove:
            remove_tree(path)
        if self.plan.orphaned and start_time(self.plan.owner) != self.plan.owner_start:
            for path in self.plan.orphaned:
                remove_tree(path)
        if self.plan.run_file:
            remove_run_file(self.plan.run_file, self.child)
        if self.record_path:
            _unlink(self.record_path)
        # Frozen on a node that its owner has left, it would stay for ever.
        send_signal(self.outer, self.outer_start, signal.SIGCONT)

    def _kill_all(self) -> int:
        """STOP and KILL until the kernel says that we have no child: then nothing is below us.

        A tree that forks and exits all the time lands with us, link by link, and each link lives
        for a moment only. So children are frozen as they are found, without a pause; only what
        was hit before and is still there (state D) is waited for. A look at /proc that finds
        nothing proves nothing: it can miss every link.
        """
        killed: set[int] = set()
        pause, misses = 0.001, 0
        while not self._reap():
            found = self._freeze()
            self._note_shared_memory(found)
            for pid, start in found.items():
                send_signal(pid, start, signal.SIGKILL)
            misses = 0 if found else misses + 1  # a child that we may not signal is found never
            if misses > 1000 or (found and found.keys() <= killed):
                time.sleep(pause)
                pause = min(pause * 2, 0.25)
            killed |= found.keys()
        return len(killed)

    def _freeze(self) -> dict[int, int]:
        """Freeze all our descendants and return them."""
        found: dict[int, int] = {}
        todo = [self.me]
        while todo:
            for pid, start in offspring(*todo.pop()).items():
                if send_signal(pid, start, signal.SIGSTOP):
                    found[pid] = start
                    todo.append((pid, start))
        return found

    def _reap(self) -> bool:
        """Reap what has ended; return whether we have no child any more."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if not pid:
                return False
            self.adopted.pop(pid, None)
            if pid == self.child:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code

    def _adopt(self, now: float) -> None:
        """End orphans whose own guard was killed; a guard among them may finish its cleaning."""
        if not self.plan.adopt_grace:
            return
        for pid, start in offspring(*self.me).items():
            if (
                pid != self.child
                and now - self.adopted.setdefault(pid, now) > self.plan.adopt_grace
            ):
                tree = {pid: start, **descendants({pid: start})}
                self._note_shared_memory(tree)
                for victim, began in tree.items():
                    send_signal(victim, began, signal.SIGKILL)

    # records ---------------------------------------------------------------------------------
    def _tree(self) -> dict[int, int]:
        found: dict[int, int] = {}
        todo = [self.me]
        while todo:
            below = offspring(*todo.pop())
            found |= below
            todo += below.items()
        return found

    def _note_shared_memory(self, tree: dict[int, int]) -> None:
        for pid in tree:
            self.shm |= shared_memory_of(pid)

    def _write_record(self) -> None:
        if not self.plan.record:
            return
        me, start = self.me
        record = {
            "boot_id": boot_id(),
            "nonce": os.environ.get("RBEE_NONCE", ""),
            "guard": {"pid": me, "start": start},
            "child": {"pid": self.child, "start": self.child_start},
            "descendants": [{"pid": p, "start": s} for p, s in sorted(self._tree().items())],
            "shm": sorted(self.shm),
            "run_file": self.plan.run_file,
        }
        text = json.dumps(record)
        if text != self.recorded:
            self.record_path = f"{self.plan.record}/guard-{me}.json"
            # Again until it is there: without it nobody could end this tree for us.
            self.recorded = text if self._replace(self.record_path, text) else ""

    def _replace(self, path: str, text: str) -> bool:
        try:
            with open(path + "~", "w") as file:
                file.write(text)
            os.rename(path + "~", path)
        except FileNotFoundError:
            return True  # the inner guard has removed the directory already
        except OSError as exc:  # a full disk must not end the tree
            if str(exc) != self.complaint:  # this comes every second
                self._log(f"cannot write {path}: {exc}")
            self.complaint = str(exc)
            return False
        return True

    def _pass_on(self, line: str) -> None:
        if self.child_in >= 0:
            try:
                os.write(self.child_in, line.encode() + b"\n")
            except OSError:  # full (a frozen command) or closed: a beat less, never a block
                pass

    def _log(self, text: str) -> None:
        try:
            os.write(2, f"{self.plan.name}[{os.getpid()}] {text}\n".encode())
        except OSError:
            pass


# the program ----------------------------------------------------------------------------------
def read_start(lifeline: int, limit: float) -> tuple[dict, bytes]:  # type: ignore[type-arg]
    """Read the ``start`` line within ``limit`` seconds; return its object and what follows it."""
    data, until = b"", time.monotonic() + limit
    while b"\n" not in data:
        left = until - time.monotonic()
        if left <= 0 or not select.select([lifeline], [], [], left)[0]:
            raise TimeoutError("no start line")
        more = os.read(lifeline, 65536)
        if not more or len(data) > 1 << 20:
            raise ValueError("no start line")
        data += more
    line, _, rest = data.partition(b"\n")
    if not line.startswith(b"start {"):
        raise ValueError("the first line is not a start line")
    return json.loads(line[6:]), rest


def append_log(path: str) -> None:
    """Make stderr append to ``path``."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)


def spawn(plan: Plan, stdin: int) -> int:
    """Start the plan's command in a session of its own; only 0, 1 and 2 are inherited.

    Not by posix_spawn: a death signal is kept over exec, but only the child itself can arm it.
    """
    me, (reader, writer) = os.getpid(), os.pipe()
    # Until the child has its own, no handler of ours may run there: they share what wakes us.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if not pid:
            _become_command(plan, stdin, me, writer)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writer)
    with open(reader) as said:  # it ends with exec
        if failed := said.read():
            os.waitpid(pid, 0)
            raise OSError(int(failed), os.strerror(int(failed)))
    return pid


def _become_command(plan: Plan, stdin: int, guard: int, failed: int) -> None:
    """In the forked child: be the command, or tell ``failed`` why not; never return."""
    try:
        if plan.die_with_guard:
            die_with_parent(signal.SIGKILL, guard)
        os.setsid()
        os.dup2(stdin, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, *STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        held = [signal.SIGINT] if plan.hold_interrupt else []
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        os.execve(plan.argv[0], plan.argv, {**os.environ, **plan.env})
    except Exception as exc:
        os.write(failed, b"%d" % (getattr(exc, "errno", 0) or errno.EINVAL))
    finally:
        os._exit(127)


def _give_up(number: int, frame: object) -> None:
    raise TimeoutError("no start line")


def wake_siblings() -> None:
    """Wake what our parent has started: sshd, whatever came over the same connection.

    Who was frozen before it had anything below it would sleep for ever: nobody else knows of it.
    Without a connection that parent is another one by now, and what it has started is not ours.
    """
    parent = os.getppid()
    start = start_time(parent)
    # Who dies closes all that it has before its children get another parent.
    if not has_hung_up(0):
        for pid, began in offspring(parent, start).items():
            send_signal(pid, began, signal.SIGCONT)


def has_hung_up(fd: int) -> bool:
    """Tell whether nobody is left at the other end of a pipe or a socket."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def main() -> int:
    set_title("rbee-guard")
    if sys.argv[1:] == ["wake"]:
        wake_siblings()
        return 0
    signal.signal(signal.SIGALRM, _give_up)  # whoever started us may have bounded the wait
    claimed = os.environ.pop("RBEE_CLAIMED", "")
    try:
        given, rest = read_start(0, 30)
        signal.setitimer(signal.ITIMER_REAL, 0)
        plan = Plan(given)
        if plan.log:
            append_log(plan.log)
        if not plan.argv:
            raise ValueError("no command")
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        os.write(2, f"rbee-guard: {exc}\n".encode())
        if claimed:
            remove_tree(claimed)
        return 2
    guard = Guard(plan, 0)

    def start(stdin: int) -> int:
        pid = spawn(plan, stdin)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 1)  # the owner sees the end of the command's output, not ours
        os.close(null)
        return pid

    try:
        guard.take(guard.lines.feed(rest))
        return guard.run(start)
    except OSError as exc:  # of `start`: `Guard` keeps its own to itself
        detail = {"code": "machine", "message": f"cannot start {plan.argv[0]}: {exc.strerror}"}
        os.write(1, f"error {json.dumps(detail)}\n".encode())
        return 127


if __name__ == "__main__":
    os._exit(main())
