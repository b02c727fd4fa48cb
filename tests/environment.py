"""Which virtual environment the tests watch for processes that nobody answers for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Beside another worker of pytest-xdist nobody can tell whose such a process is: there the whole
# run looks for them at its end.
VENV = None if "PYTEST_XDIST_WORKER" in os.environ else Path(sys.prefix)
