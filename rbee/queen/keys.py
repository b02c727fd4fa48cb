"""Named keys: who may use models without the queen's token, and how much.

They stand in config.toml, which is read again when it has changed, so a key that is taken out
opens nothing from then on. Kept are hashes only.
"""

from __future__ import annotations

import hmac
import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import attrs
import trio

from rbee.config import ConfigError, KeyConfig, load_config
from rbee.errors import ForbiddenError, RateLimitedError, RbeeError, UsageError
from rbee.home import read_token_file
from rbee.models.reference import shown
from rbee.paths import full_path
from rbee.queen.placement import Meanings
from rbee.web.door import Caller
from rbee.wire.messages import TaskRequest

log = logging.getLogger(__name__)

MINUTE = 60.0
PLAIN = TaskRequest("")
# Where a model comes from and how its worker is started: another value is another worker.
OWNERS = (
    "hub", "engine_args", "node", "backend", "device", "max_model_len", "dtype", "kv_cache_bytes",
    "max_num_seqs", "keep_alive",
)  # fmt: skip
ROUNDING = 0.001  # seconds; who waits as long as he is told must be let in


@attrs.define(eq=False)
class Key:
    """One key that is in use; what it has used stays when its limits change."""

    name: str
    digest: bytes = attrs.field(repr=False)
    limits: KeyConfig
    _at: int = 0
    _times: deque[float] = attrs.field(factory=deque)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Count a request while the body runs.

        Raises:
            RateLimitedError: as many as may be run, or came within the last minute.
        """
        self._check_at_once()
        self._note_time()
        with self.holding():
            yield

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Count what goes on of a request that has been let in."""
        self._at += 1
        try:
            yield
        finally:
            self._at -= 1

    def _check_at_once(self) -> None:
        most = self.limits.requests_at_once
        if most is not None and self._at >= most:
            raise RateLimitedError(
                f"the key {self.name!r} has {self._at} requests running, {most} may be",
                retry_after=1,
            )

    def _note_time(self) -> None:
        most, now = self.limits.requests_per_minute, trio.current_time()
        while self._times and now - self._times[0] >= MINUTE - ROUNDING:
            self._times.popleft()
        if most is None:
            self._times.clear()
            return
        if len(self._times) >= most:
            after = max(1, math.ceil(self._times[-most] + MINUTE - now))
            raise RateLimitedError(
                f"the key {self.name!r} may make {most} requests a minute; it can make the next "
                f"one in {after} s",
                retry_after=after,
            )
        self._times.append(now)

    def may_use(self, model: str, meanings: Meanings) -> bool:
        """Tell whether a model may be asked for, under any of its names."""
        names = set(meanings(model))
        allowed = self.limits.models
        return not allowed or any(not names.isdisjoint(meanings(one)) for one in allowed)

    def check_model(self, model: str, meanings: Meanings) -> None:
        """Raise `ForbiddenError` if a model may not be asked for."""
        if not self.may_use(model, meanings):
            raise ForbiddenError(
                f"the key {self.name!r} may not use {shown(model)}; it may use "
                + ", ".join(self.limits.models),
                code="model_not_allowed",
                param="model",
            )

    def check_start(self, request: TaskRequest) -> None:
        """Raise `ForbiddenError` for what says how a worker is started: that is the owner's."""
        given = [name for name in OWNERS if getattr(request, name) != getattr(PLAIN, name)]
        if given:
            raise ForbiddenError(
                f"the key {self.name!r} may not set {', '.join(given)}; who has the queen's "
                "token may",
                code="option_not_allowed",
                param=given[0],
            )


def key_of(caller: Caller | None) -> Key | None:
    return caller if isinstance(caller, Key) else None


class Keys:
    """The keys of one home."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._keys: dict[str, Key] = {}
        self._seen: object = None
        self._files: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def find(self, sent: bytes) -> Key | None:
        """Return the key that was sent, if it is one."""
        self._refresh()
        digest = sha256(sent).digest()
        found = None
        for key in self._keys.values():  # all of them: the time must not tell which
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self) -> None:
        config, files = _stamp(self._file), tuple(map(_stamp, self._files))
        if (config, files) == self._seen:
            return
        try:
            self._take(load_config(self._file).keys)
        except ConfigError as exc:
            log.warning("the keys stay as they were: %s", exc)
        self._seen = (config, tuple(map(_stamp, self._files)))

    def _take(self, said: dict[str, KeyConfig]) -> None:
        before, self._keys = self._keys, {}
        self._files = tuple(_path(one.file) for one in said.values() if one.file)
        for name, limits in said.items():
            try:
                digest = _digest(limits)
            except RbeeError as exc:
                log.warning("the key %r opens nothing: %s", name, exc)
                continue
            key = self._keys[name] = before.get(name) or Key(name, digest, limits)
            key.digest, key.limits = digest, limits


def _digest(limits: KeyConfig) -> bytes:
    if limits.sha256:
        return bytes.fromhex(limits.sha256)
    return sha256(read_token_file(full_path(limits.file)).encode("latin-1")).digest()


def _path(text: str) -> Path:
    try:
        return full_path(text)
    except UsageError:  # told where it is read
        return Path(text)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)
