"""One file from a hub to the disk: goes on where it was cut off, and is checked as it comes.

huggingface_hub's own download is not used for the bytes: it retries five times whatever the caller
wants, each file costs a request more, and what it wrote would have to be read again to be hashed.
Its session, its headers and its addresses are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from rbee.errors import InsufficientError, MachineError, PeerError, RbeeError, UnavailableError
from rbee.models.catalog import File
from rbee.models.preflight import free_disk
from rbee.models.progress import amount
from rbee.models.refusals import RETRIED, Asked
from rbee.models.repository import Remote
from rbee.units import human

BLOCK = 2**20
LONGEST_PAUSE = 60.0
WRONG_BODIES = 2  # so often a file may come whole and wrong


@attrs.frozen
class Limits:
    """How patient a download is, in seconds.

    Attributes:
        contact: for the first answer of the hub, all in all.
        connect: for one connection.
        stall: without a byte; then it is cut and taken up again.
        tries: in a row without a byte gained.
        pause: before the second try; doubled for each further one.
    """

    contact: float = 30.0
    connect: float = 10.0
    stall: float = 60.0
    tries: int = 6
    pause: float = 1.0


class StoppedError(Exception):
    """Another file failed, so this one is given up."""


class _CutError(Exception):
    """This try failed; the next one may not. ``after``: when the hub asks for patience."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


@attrs.define(eq=False)
class Transfer:
    """Fetches one file to ``path`` in the calling thread.

    Attributes:
        http: the package that ``session`` is of.
        count: is told of bytes gained, or lost (negative).
        tell: is told of tries that failed, as an action and a text.
        stop: gives up when set.
    """

    file: Remote
    path: Path
    url: str
    session: Any
    http: Any
    headers: Mapping[str, str]
    asked: Asked
    limits: Limits
    count: Callable[[int], None]
    tell: Callable[[str, str], None]
    stop: threading.Event
    _size: int | None = None
    _have: int = 0
    _most: int = 0
    _failed: int = 0
    _wrong: int = 0
    _digest: Any = None

    def fetch(self) -> File:
        """Return when the whole file is there and is what the hub said it is.

        Raises:
            RbeeError: refused, tries used up, wrong content, no disk left.
            StoppedError: ``stop`` was set.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                return self._fetch(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise self._disk_error(exc) from exc

    def _fetch(self, fd: int) -> File:
        self._size = self.file.size
        self._take_up(fd)
        while True:
            try:
                if self._size is None or self._have < self._size:
                    self._receive(fd)
                if self._is_right():
                    return File(self.file.name, self._have, self.file.sha256)
                self._begin_anew(fd)
                self._refuse_wrong()
            except _CutError as exc:
                self._pause(exc)

    # what is there -------------------------------------------------------------------------------

    def _take_up(self, fd: int) -> None:
        """Hash what an earlier download left."""
        self._forget()
        while block := os.read(fd, BLOCK):
            self._add(block)
        if self._size is not None and self._have > self._size:
            self._begin_anew(fd)
        self._most = self._have

    def _begin_anew(self, fd: int) -> None:
        self.count(-self._have)
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        self._forget()

    def _forget(self) -> None:
        self._have = 0
        self._digest = None
        if self.file.sha256:
            self._digest = hashlib.sha256()
        elif self.file.git_sha1 and self._size is not None:
            self._digest = hashlib.sha1(b"blob %d\0" % self._size, usedforsecurity=False)

    def _add(self, block: bytes) -> None:
        if self._digest is not None:
            self._digest.update(block)
        self._have += len(block)

    def _is_right(self) -> bool:
        return self._digest is None or self._digest.hexdigest() == (
            self.file.sha256 or self.file.git_sha1
        )

    # what comes ----------------------------------------------------------------------------------

    def _receive(self, fd: int) -> None:
        headers = {**self.headers, "Accept-Encoding": "identity"}
        if self._have:
            headers["Range"] = f"bytes={self._have}-"
        timeout = self.http.Timeout(self.limits.stall, connect=self.limits.connect)
        try:
            with self.session.stream("GET", self.url, headers=headers, timeout=timeout) as response:
                self._begin(fd, response)
                for block in response.iter_bytes():
                    self._take(fd, block)
        except self.http.ConnectTimeout:
            raise _CutError(f"no connection within {self.limits.connect:g} s") from None
        except self.http.TimeoutException:
            raise _CutError(f"no byte for {self.limits.stall:g} s") from None
        except self.http.RequestError as exc:
            raise _CutError(f"{type(exc).__name__}: {exc}") from None
        if self._size is not None and self._have < self._size:
            raise _CutError(f"it ended after {self._have} of {self._size} bytes")

    def _begin(self, fd: int, response: Any) -> None:
        """Look at the head of an answer: where in the file do its bytes belong?"""
        status, headers = response.status_code, response.headers
        if status in RETRIED:
            raise _CutError(f"the hub answers {status}", _seconds(headers.get("retry-after", "")))
        if status == 416 or (status == 206 and not _begins_at(headers, self._have)):
            self._begin_anew(fd)
            raise _CutError("the hub cannot go on from there")
        if status not in (200, 206):
            raise self.asked.refused(status, headers, self.file.name)
        if status == 200 and self._have:
            self._begin_anew(fd)  # it knows no ranges
        if self._size is None and "content-encoding" not in headers:
            length = headers.get("content-length", "")
            self._size = self._have + int(length) if length.isdigit() else None

    def _take(self, fd: int, block: bytes) -> None:
        if self.stop.is_set():
            raise StoppedError
        if self._size is not None and self._have + len(block) > self._size:
            self._begin_anew(fd)
            raise _CutError(f"more came than the {self._size} bytes that it has")
        written = os.write(fd, block)
        while written < len(block):  # a disk that is nearly full takes what it can
            written += os.write(fd, block[written:])
        self._add(block)
        self.count(len(block))

    # what went wrong -----------------------------------------------------------------------------

    def _pause(self, cut: _CutError) -> None:
        """Wait before the next try; raise when there is none."""
        if self.stop.is_set():
            raise StoppedError
        self._failed = 0 if self._have > self._most else self._failed + 1
        self._most = max(self._most, self._have)
        if self._failed >= self.limits.tries:
            raise self._given_up(cut)
        pause = min(self.limits.pause * 2**self._failed, LONGEST_PAUSE)
        pause = max(pause * random.uniform(0.5, 1.0), min(cut.after, LONGEST_PAUSE))
        self.tell("retry", f"{self.file.name}: {cut}; once more in {pause:.1f} s")
        if self.stop.wait(pause):
            raise StoppedError

    def _given_up(self, cut: _CutError) -> RbeeError:
        of = human(self._have) if self._size is None else amount(self._have, self._size)
        return UnavailableError(
            f"cannot fetch {self.file.name} of {self.asked.name} from {self.asked.hub}: {cut}, "
            f"{self.limits.tries} times in a row; what came ({of}) is kept",
            code="download_failed",
            hint=f"rbee-keeper model pull {self.asked.name}   # goes on from there",
        )

    def _refuse_wrong(self) -> None:
        self._wrong += 1
        if self._wrong >= WRONG_BODIES:
            raise PeerError(
                f"{self.file.name} of {self.asked.name} came whole {self._wrong} times from "
                f"{self.asked.hub}, but its hash is not the one that the hub tells; it was removed",
                code="wrong_hash",
                hint=f"rbee-keeper model pull {self.asked.name}   # or with another HF_ENDPOINT",
            )
        self._most = 0
        self.tell("retry", f"{self.file.name}: its hash is wrong; once more from the beginning")

    def _disk_error(self, exc: OSError) -> RbeeError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return InsufficientError(
                f"the disk is full at {human(self._have)} of {self.file.name}; what came is kept",
                code="insufficient_disk",
                hint="rbee-keeper model list   # then rbee-keeper model rm MODEL",
                required=(self._size or self._have) - self._have,
                available=free_disk(self.path),
            )
        return MachineError(
            f"cannot write {self.path}: {exc.strerror}",
            code="home_not_writable",
            hint=f"ls -ld {self.path.parent}",
        )


def _begins_at(headers: Mapping[str, str], offset: int) -> bool:
    return headers.get("content-range", "").startswith(f"bytes {offset}-")


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0
