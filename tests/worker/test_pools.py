"""When the copies of vLLM's tokenizer are made, with vLLM's own pools in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbee.testing.tiny_model import write_tiny_model

SCRIPT = """
import copy, json, os, sys
from rbee.worker.vllm_engine import import_vllm
import_vllm()
import_vllm()  # as zygote and worker do
from vllm.renderers import hf
from vllm.tokenizers import get_tokenizer
from rbee.worker.pools import filling

copies = []
real = copy.deepcopy


def deepcopy(thing, *args):
    if isinstance(thing, hf.HfTokenizer):
        copies.append(thing)
    return real(thing, *args)


copy.deepcopy = deepcopy
pool = hf.maybe_make_thread_pool(copy.copy(get_tokenizer(sys.argv[1])), 2)
before = len(copies)
reader, writer = os.pipe()
if not (pid := os.fork()):  # the engine
    filling.begin()
    filling.wait()
    os.write(writer, b"%d" % len(copies))
    os._exit(0)
os.waitpid(pid, 0)
filling.wait()
after = len(copies)
pool.encode("hello")
print(json.dumps([before, int(os.read(reader, 9)), after, len(copies)]))
"""


@pytest.mark.slow
def test_they_are_made_once_the_engine_was_forked(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    # An engine that ran in this process has left its own, which are gone.
    places = {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)],
        env=os.environ | places, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, in_the_engine, after, used = json.loads(done.stdout.splitlines()[-1])
    assert (before, in_the_engine, after, used) == (0, 0, 2, 2)
