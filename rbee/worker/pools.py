"""vLLM's copies of the tokenizer are made while its engine process loads, not before it starts.

vLLM keeps a pool of copies, as a thread may not use a tokenizer that another one uses; a copy takes
0.2 s (SmolLM2's). One that is not there when it is needed, vLLM makes then, so the pools may start
empty.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs

log = logging.getLogger(__name__)

# Seconds in which the engine's first message is answered: copying keeps all other threads waiting.
PAUSE = 0.3


@attrs.define(eq=False)
class Filling:
    """Fills pools beside this process's other threads, once it has forked the engine."""

    _wanted: list[tuple[Any, int]] = attrs.field(factory=list)
    _threads: list[threading.Thread] = attrs.field(factory=list)

    def add(self, tokenizer: Any, copies: int) -> None:
        self._wanted.append((tokenizer, copies))

    def begin(self) -> None:
        """Start to fill: not before the fork, or the engine would be forked beside busy threads."""
        wanted, self._wanted = self._wanted, []
        for pool in wanted:
            thread = threading.Timer(PAUSE, _fill, pool)
            thread.daemon = True
            thread.start()
            self._threads.append(thread)

    def forget(self) -> None:
        self._wanted, self._threads = [], []

    def wait(self) -> None:
        """Return when all is filled; without an engine that was forked none is, and at once."""
        while self._threads:
            self._threads.pop().join()


filling = Filling()


def _fill(pool: Any, copies: int) -> None:
    try:
        _borrow(pool, copies)
    except Exception:  # vLLM tries again when it needs one
        log.warning("the pool of tokenizers is not filled", exc_info=True)


def _borrow(pool: Any, copies: int) -> None:
    """Use that many at once and leave them in the pool: each asks for its tokens while in use."""

    def tokens() -> Iterator[str]:
        if copies > 1:
            _borrow(pool, copies - 1)
        yield from ()

    pool.convert_tokens_to_ids(tokens())


def fill_pools_late() -> None:
    """Have vLLM make its pools of tokenizers empty, and fill them after the next fork."""
    try:
        from vllm.renderers import hf

        make = hf.maybe_make_thread_pool
        if not hasattr(make, "__wrapped__"):
            hf.maybe_make_thread_pool = _empty_first(make)
            os.register_at_fork(after_in_parent=filling.begin, after_in_child=filling.forget)
    except Exception as exc:  # another version; it is for speed only
        log.info("vLLM fills its pools itself: %s", exc)


def _empty_first(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def wrapper(tokenizer: Any, copies: int = 1) -> Any:
        made = make(tokenizer, 0)
        if is_pool(made):
            filling.add(made, copies)
        return made

    return wrapper


def is_pool(tokenizer: Any) -> bool:
    """Tell whether any thread may use it: others of transformers break when two use them."""
    return "ThreadSafeHFTokenizerMixin" in {base.__name__ for base in type(tokenizer).__mro__}
