"""A small owned daemon: says hello, or what its first argument tells, and keeps a child."""

import json
import os
import subprocess
import sys
import time

how = sys.argv[1]
line = sys.stdin.readline()
start = json.loads(line.partition(" ")[2])
if how == "exit":
    print("no way", file=sys.stderr)
    sys.exit(3)
if how == "no-module":
    import rbee_does_not_exist  # noqa: F401
if how == "silent":
    time.sleep(1000)
if how == "nonsense":
    print("good morning", flush=True)
    time.sleep(1000)
if how == "error":
    print('error {"code": "home_not_writable", "message": "no room", "hint": "df -h"}', flush=True)
    sys.exit(1)
# In a session of its own, and deaf to TERM: only a guard ends it.
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
child = subprocess.Popen(
    [sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.DEVNULL
)
hello = {
    "component": "hive", "id": "hive-1", "version": "0", "pid": os.getpid(), "url": "http://x",
    "capabilities": {"start": start, "child": child.pid, "argv": sys.argv[2:]},
}  # fmt: skip
print("hello " + json.dumps(hello), flush=True)
while how == "flood":
    print("x" * 1000)
for line in sys.stdin:
    if line == "stop\n":
        break
