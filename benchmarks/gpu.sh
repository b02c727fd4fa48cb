#!/bin/sh
# On a machine with an NVIDIA GPU and rbee[cuda]: the memory back after every kill, starts and
# throughput, as one JSON and one table.
#   benchmarks/gpu.sh [--model DIR] [--json FILE] [PART …]     (--help tells the rest)
# PYTHON is the one that rbee is installed in; without it that of .venv, else python3.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$here/../.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
exec "$PYTHON" "$here/gpu.py" "$@"
