"""A program that plants children which are hard to find, says so, and waits to be killed.

Each ignores the stop signals: one calls itself as vLLM does, one has a session of its own, one is
double-forked and has an empty environment.
"""

import os
import subprocess
import sys

BODY = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
import setproctitle
setproctitle.setproctitle(sys.argv[1])
print("up", flush=True)
time.sleep(300)
"""
KINDS = ("VLLM::EngineCore", "planted-setsid", "planted-noenv")


def start(kind: str) -> None:
    env = {} if kind == "planted-noenv" else None
    session = kind != "VLLM::EngineCore"
    argv = [sys.executable, "-c", BODY, kind]
    child = subprocess.Popen(argv, env=env, start_new_session=session, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()


for kind in KINDS:
    if kind == "planted-noenv" and os.fork() == 0:
        start(kind)
        os._exit(0)
    elif kind != "planted-noenv":
        start(kind)
os.wait()
print("planted", flush=True)
sys.stdin.read()
