"""Commands for errors to suggest: each one runs as it stands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

MODEL = "smollm2-135m"  # of the built-in aliases; where an error knows no other
# As in the Makefile: PyPI itself does not have the CPU build of torch.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def infer(*flags: object, model: str = MODEL, prompt: str = "Hello") -> str:
    """Write an `infer` with ``flags`` beside the two that it needs."""
    words = ["rbee-keeper", "infer", "--model", model, "--prompt", prompt, *map(str, flags)]
    return shlex.join(words)


def logs_of(worker_id: str, node: str) -> str:
    """Write the `logs` of a worker, which lie on its node."""
    from rbee.model import LOCALHOST  # which imports us

    where = "" if node == LOCALHOST else f" --node {node}"
    return f"rbee-keeper logs --worker {worker_id}{where}"


def ls(path: Path, *flags: str) -> str:
    """Write the command that shows what is at a path."""
    return shlex.join(["ls", *flags, str(path)])


def pull(model: object, *flags: object) -> str:
    """Write the command that fetches a model, or takes it from a path."""
    return shlex.join(["rbee-keeper", "model", "pull", *map(str, (model, *flags))])


def install(extra: str = "") -> str:
    """Write the command that installs rbee where it runs.

    It names a source tree, never a package: rbee is on no index, whoever else's may be.
    """
    words = [sys.executable, "-m", "pip", "install", *_index(extra)]
    words += ["-e"] if source_tree() else []
    return shlex.join([*words, rbee_source(extra)]) + _where()


def download(directory: Path, what: str) -> str:
    """Write the command that fetches the wheels of ``what``, a requirement, into a directory."""
    words = ["pip", "download", "--only-binary=:all:", "--dest", str(directory), *_index(what)]
    return shlex.join([*words, what])


def download_rbee(directory: Path, extra: str, *, then: str = "") -> str:
    """Write the command that fetches all that rbee depends on into a directory.

    ``then`` is what to run when it is there.
    """
    words = ["pip", "download", "--only-binary=:all:", "--dest", str(directory), *_index(extra)]
    more = f" && {then}" if then else ""
    return shlex.join([*words, rbee_source(extra)]) + more + _where()


def rbee_source(extra: str) -> str:
    """Return what pip is to be given for the rbee that runs, with an extra or none ("")."""
    return f"{source_tree() or '.'}{f'[{extra}]' if extra else ''}"


def source_tree() -> Path | None:
    """Return the tree that rbee runs from; None if it was installed from one that nobody knows."""
    tree = Path(__file__).parents[1]
    return tree if (tree / "pyproject.toml").is_file() else None


def _index(what: str) -> list[str]:
    return ["--extra-index-url", TORCH_CPU_INDEX] if "cpu" in what else []


def _where() -> str:
    return "" if source_tree() else "   # in the source tree of rbee"
