"""Triton's and PyTorch's compilers: all workers compile alike, so that one's kernels serve all.

Where Triton looks for a compiled kernel depends on the assembler it would compile it with. PyTorch
brings its own, and has Triton use it from when it compiles a model itself, which it need not do in
each process: the same kernels were compiled up to three times, 10 to 15 s each.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module

log = logging.getLogger(__name__)

KEYS = {"triton.runtime.cache": "triton_key", "torch._inductor.codecache": "torch_key"}
TASKS = "torch._inductor.runtime.compile_tasks"
CHOICES = ("_set_triton_ptxas_path", "_set_triton_libdevice_path")  # not all in each version


def choose_tools() -> None:
    """Have PyTorch choose what Triton compiles with now, not once it compiles itself."""
    try:
        tasks = import_module(TASKS)
        for choose in (getattr(tasks, name, None) for name in CHOICES):
            if choose is not None:
                choose()
    except Exception as exc:  # another version; it is for speed only
        log.info("PyTorch chooses late what Triton compiles with: %s: %s", type(exc).__name__, exc)


def hash_sources() -> None:
    """Have both hash their own sources: each engine would, for keys of its caches."""
    for module, key in KEYS.items():
        if module in sys.modules:
            try:
                getattr(sys.modules[module], key)()  # which keeps its result
            except Exception as exc:
                log.info("not hashed: %s (%s: %s)", module, type(exc).__name__, exc)
