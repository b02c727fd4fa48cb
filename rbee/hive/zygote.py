"""The zygote: imports an engine once, then forks guarded workers.

It runs as ``python -m rbee.hive.zygote ENGINE FD PARENT LOG`` below a hive, or is forked off it
(`rbee.hive.ahead`). It has one thread and no event loop, and speaks JSON messages on a
SOCK_SEQPACKET socket, with file descriptors beside:

    hive → zygote   {"fork": {plan of the guard}, "config": {WorkerConfig}} + lifeline, log
    zygote → hive   {"ready": seconds, "threads": n} · {"forked": worker id, "pid": n} + pidfd
                    {"error": worker id, "message": text} · {"exited": pid, "status": n}

Each fork makes a guard (a child subreaper with the worker as its only command); the zygote is the
outer subreaper: what a killed guard leaves is its own to kill.
"""

from __future__ import annotations

import array
import gc
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import setproctitle

from rbee import guard
from rbee.garbage import collect_rarely
from rbee.lean import no_collecting, skip_httpx_command
from rbee.worker.engine import engine_kind

log = logging.getLogger("rbee.hive.zygote")

MAX_MESSAGE = 1 << 18
# The threads of NVML, which we close, and of jemalloc, which mends itself after a fork.
HARMLESS = re.compile(r"cuda[0-9a-f]+|jemalloc_bg_thd")
OOM_SCORE = 500  # the OOM killer spares queen, hive, guards and sshd


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], ancillary)


def unpack(data: bytes, ancillary: Any) -> tuple[dict[str, Any], list[int]]:
    """Make a message and its file descriptors from what recvmsg returned."""
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return json.loads(data), list(fds)


class Zygote:
    """One engine, imported; forks until its hive is gone."""

    def __init__(self, sock: socket.socket, log_file: str) -> None:
        self.sock = sock
        self.log_file = log_file
        self.guards: dict[int, str] = {}  # with the directory of its journal

    def run(self) -> None:
        wakeup = self._catch_sigchld()
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(wakeup, select.POLLIN)
        while True:
            guard.cap_log(self.log_file)  # we write only when there is something to do
            ready = dict(poll.poll())
            if wakeup in ready:
                os.read(wakeup, 4096)
                self._reap()
            if self.sock.fileno() in ready and not self._serve_one():
                return

    def _catch_sigchld(self) -> int:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        return reader

    def _serve_one(self) -> bool:
        space = socket.CMSG_LEN(4 * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self.sock.recvmsg(MAX_MESSAGE, space)
        except ConnectionResetError:  # it has gone without reading all that we told it
            return False
        if not data:
            return False
        message, fds = unpack(data, ancillary)
        try:
            self._fork(message, *fds)
        except (OSError, RuntimeError) as exc:
            self._tell({"error": message["config"]["spec"]["id"], "message": str(exc)})
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, message: dict[str, Any], lifeline: int, log_fd: int) -> None:
        refuse_unsafe_fork()
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            become_guard(message, lifeline, log_fd, me)
        self.guards[pid] = str(message["fork"].get("record", ""))
        pidfd = os.pidfd_open(pid)
        self._tell({"forked": message["config"]["spec"]["id"], "pid": pid}, pidfd)
        os.close(pidfd)

    def _reap(self) -> None:
        ended: list[tuple[int, int]] = []
        journals: list[str] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid in self.guards:
                journals.append(self.guards.pop(pid))
                code = os.waitstatus_to_exitcode(status)
                ended.append((pid, code if code >= 0 else 128 - code))
        if ended:
            # First: who hears of the exit takes for gone what the journal does not name.
            for orphan in self._kill_orphans():
                note_orphan(orphan, journals)
        for pid, code in ended:
            self._tell({"exited": pid, "status": code})

    def _tell(self, message: dict[str, Any], *fds: int) -> None:
        try:
            send(self.sock, message, fds)
        except OSError as exc:
            log.warning("hive is gone: %s", exc)

    def _kill_orphans(self) -> list[int]:
        """End what a killed guard left: our children that are not guards, and all below them.

        Returns those that do not end.
        """
        until = time.monotonic() + 1.0
        while orphans := [p for p in guard.children(os.getpid()) if p not in self.guards]:
            for pid in orphans:
                root = {pid: guard.start_time(pid)}
                tree = root | guard.descendants(root)
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for victim, start in tree.items():
                        guard.send_signal(victim, start, number)
            if time.monotonic() > until:
                return orphans  # stuck in the kernel: the hive and its guards go on
            time.sleep(0.002)
            self._wait_for(orphans)
        return []

    def _wait_for(self, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def note_orphan(pid: int, journals: list[str]) -> None:
    """Note one that does not end in the journals of the guards that may have left it.

    Guards write once a second: it may be too young for theirs.
    """
    tree = {pid: guard.start_time(pid)}
    tree |= guard.descendants(tree)
    members = [{"pid": one, "start": start} for one, start in tree.items()]
    record = {
        "boot_id": guard.boot_id(),
        "guard": {"pid": pid, "start": 0},  # there is none any more
        "child": members[0],
        "descendants": members[1:],
        "shm": sorted(set().union(*map(guard.shared_memory_of, tree))),
    }
    for journal in filter(None, journals):
        with suppress(OSError):  # that guard has come to its end, and left nothing
            Path(journal, f"guard-{pid}.json").write_text(json.dumps(record))


def refuse_unsafe_fork() -> None:
    """Forking with threads or a CUDA context gives children that hang: refuse, the hive execs."""
    if threads := unsafe_threads():
        raise RuntimeError(f"the zygote has other threads: {', '.join(threads)}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("the zygote has a CUDA context")


def unsafe_threads() -> list[str]:
    """Name our other threads, but for those that a forked child does without."""
    names = []
    for task in set(os.listdir("/proc/self/task")) - {str(os.getpid())}:
        with suppress(OSError):  # it has just ended
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return sorted(name for name in names if not HARMLESS.fullmatch(name))


def become_guard(message: dict[str, Any], lifeline: int, log_fd: int, parent: int) -> None:
    """In the forked child: be the guard of one worker, never return."""
    code = 1
    try:
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        guard.close_all_but([lifeline])
        os.setsid()
        guard.libc.prctl(guard.PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        setproctitle.setproctitle("rbee-guard")
        guard.set_oom_score(0)  # it must outlive its worker
        plan = guard.Plan({**message["fork"], "parent": parent})
        code = guard.Guard(plan, lifeline).run(lambda stdin: fork_worker(message["config"], stdin))
    except BaseException:
        logging.exception("guard failed")
    finally:
        os._exit(code)


def fork_worker(config: dict[str, Any], stdin: int) -> int:
    """Fork the worker itself below its guard."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        guard.die_with_parent(signal.SIGKILL, parent)
        signal.set_wakeup_fd(-1)
        for number in (*guard.STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        guard.close_all_but([stdin])
        os.setsid()
        guard.set_oom_score(OOM_SCORE)
        code = run_worker(config, stdin)
    except BaseException:
        logging.exception("worker failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no interpreter teardown: with torch loaded it takes seconds


def run_worker(config: dict[str, Any], lifeline: int) -> int:
    from rbee.model import WorkerConfig
    from rbee.wire import codec
    from rbee.worker import daemon

    code: int = daemon.run_worker(codec.structure(config, WorkerConfig), lifeline=lifeline)
    return code


def serve(engine: str, sock: socket.socket, parent: int, log_file: str) -> int:
    """Be an engine's zygote until its hive's end of ``sock`` closes."""
    guard.die_with_parent(signal.SIGKILL, parent)
    guard.become_subreaper()
    setproctitle.setproctitle("rbee-zygote")
    form = "%(asctime)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)
    guard.set_oom_score(OOM_SCORE)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the hive ends us, with the socket
    guard.release_interrupt()
    skip_httpx_command()
    began = time.monotonic()
    with no_collecting():
        engine_kind(engine).preload()
        gc.collect()
    collect_rarely()
    threads = 1 + len(unsafe_threads())
    send(sock, {"ready": time.monotonic() - began, "threads": threads})
    Zygote(sock, log_file).run()
    return 0


def main() -> int:
    engine, fd, parent, log_file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    return serve(engine, sock, parent, log_file)


if __name__ == "__main__":
    os._exit(main())
