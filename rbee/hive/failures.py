"""Why a worker failed, from what its process left behind."""

from __future__ import annotations

import json
from pathlib import Path

from rbee.errors import ChildExitedError, RbeeError, UnavailableError, from_wire
from rbee.hints import logs_of
from rbee.model import WorkerSpec
from rbee.process import child_exited, log_tail


def too_slow(worker: WorkerSpec, log_file: Path, limit: float) -> RbeeError:
    return UnavailableError(
        f"worker {worker.id} was not ready within {limit:g} s",
        code="load_timeout",
        hint=logs_of(worker.id, worker.node),
        log=log_tail(log_file),
    )


def outlived(worker: str, node: str) -> RbeeError:
    return ChildExitedError(
        f"worker {worker} ended unasked, and its guard has not yet ended what it left",
        hint=logs_of(worker, node),
    )


def died(worker: WorkerSpec, log_file: Path, status: int) -> RbeeError:
    """Make the error of a worker that ended unasked; it may have said why on its log."""
    tail = log_tail(log_file, 8000)
    for line in reversed(tail.splitlines()):
        _, found, text = line.partition("rbee-error ")
        if found and (said := _said(text)):
            told = [line for line in tail.splitlines() if "rbee-error " not in line]
            said.details.setdefault("log", "\n".join(told)[-2000:])
            return said
    error: ChildExitedError = child_exited(f"worker {worker.id}", status, log_file)
    error.hint = logs_of(worker.id, worker.node)
    return error


def _said(text: str) -> RbeeError | None:
    try:
        detail = json.loads(text)
        return from_wire(
            detail["code"], detail["message"], hint=detail.get("hint", ""),
            details=detail.get("details") or {},
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None
