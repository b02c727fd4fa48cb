"""The documents of the daemons."""

from __future__ import annotations

from importlib import import_module

from rbee import __version__
from rbee.api.operation import document
from rbee.api.schema import Schema

DAEMONS = {"queen": "queen-rbee", "hive": "rbee-hive", "worker": "llm-worker-rbee"}


def document_of(daemon: str) -> Schema:
    """Return the OpenAPI document of ``queen``, ``hive`` or ``worker``."""
    module = import_module(f"rbee.api.{daemon}")
    return document(DAEMONS[daemon], module.ABOUT, __version__, module.OPERATIONS)
