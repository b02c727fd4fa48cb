"""``$RBEE_HOME/config.toml`` as frozen values.

The file has tables of its own: ``[aliases]``, ``[keys.NAME]`` for who may use the models of the
queen, and ``[queen]``, ``[hive]`` and ``[worker]`` with the flags of these three programs. All else
in it are flags of `rbee-keeper`, checked there: at the top for every command, in a table named
after a command (``[infer]``) for that one.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from rbee.alias import Defaults, read_alias
from rbee.errors import UsageError
from rbee.model import HIVE_PORT, LOCALHOST, QUEEN_PORT, WORKER_PORT

OWN_TABLES = ("aliases", "keys", "queen", "hive", "worker")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ConfigError(UsageError):
    """``config.toml`` is wrong; the message names the file and the key."""

    code = "config"


# The programs' own arguments say what these tables may hold, and a test holds both together; they
# are written out here so that the keeper can check the file without loading the programs.
@attrs.frozen
class QueenConfig:
    """``[queen]``: what `queen-rbee` takes where command line and environment say nothing."""

    host: str = "127.0.0.1"
    port: int = QUEEN_PORT
    hive_port: int | None = None
    lease: float = 10.0
    token_file: str | None = None
    allow_origin: tuple[str, ...] = ()
    slots: int | None = None
    max_waiting: int = 1024
    max_waiting_per_model: int = 256
    max_waiting_size: str = "256M"


@attrs.frozen
class HiveConfig:
    """``[hive]``: what `rbee-hive` takes where command line and environment say nothing."""

    host: str = "127.0.0.1"
    port: int = HIVE_PORT
    worker_port: int = WORKER_PORT
    node: str = LOCALHOST
    memory: str | None = None
    token_file: str | None = None


@attrs.frozen
class WorkerFlags:
    """``[worker]``: the same for `llm-worker-rbee` by hand; a hive says all to its workers."""

    model: str = ""
    engine: str = "vllm"
    backend: str = "cpu"
    device: str = "0"
    host: str = "127.0.0.1"
    port: int = WORKER_PORT
    served_name: tuple[str, ...] = ()
    task: str = "generate"
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    engine_arg: tuple[str, ...] = ()
    token_file: str | None = None
    hive_url: str = ""
    id: str = ""
    run_dir: str | None = None


@attrs.frozen
class KeyConfig:
    """``[keys.NAME]``: who may use models without the queen's token.

    Attributes:
        sha256: of the key, in hex; it stands here instead of a ``file`` with the key.
        requests_at_once, requests_per_minute: beyond them is a 429; None is no bound.
        models: the names that may be asked for, and others for the same models; () is all.
    """

    sha256: str = attrs.field(default="", repr=False)
    file: str = ""
    requests_at_once: int | None = None
    requests_per_minute: int | None = None
    models: tuple[str, ...] = ()


@attrs.frozen
class Config:
    """One ``config.toml``.

    Attributes:
        aliases: a model's short name → its sources, tried in order.
        defaults: the same names → what holds for requests that say nothing else; only those that
            set something.
        keys: who may use models, by name.
        flags: what is not one of the tables above, as parsed.
        source: the file's path, for errors.
    """

    aliases: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    defaults: dict[str, Defaults] = attrs.field(factory=dict)
    queen: QueenConfig = attrs.field(factory=QueenConfig)
    hive: HiveConfig = attrs.field(factory=HiveConfig)
    worker: WorkerFlags = attrs.field(factory=WorkerFlags)
    keys: dict[str, KeyConfig] = attrs.field(factory=dict)
    flags: dict[str, Any] = attrs.field(factory=dict)
    source: str = ""


def load_config(path: Path) -> Config:
    """Read ``config.toml``; a missing file is an empty one.

    Raises:
        ConfigError: it cannot be read, is not TOML, or holds an unknown key or a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Config(source=str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}", hint=f"ls -l {path}") from exc
    return _structure(_parse(text, path), path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not TOML: {exc}", hint=f"${{EDITOR:-vi}} {path}") from exc


def _structure(data: dict[str, Any], path: Path) -> Config:
    # `worker = "…"` at the top is a flag of the keeper's (`logs --worker`), `[worker]` a table.
    is_flag = not isinstance(data.get("worker", {}), dict)
    own = {key for key in data if key in OWN_TABLES and not (key == "worker" and is_flag)}
    aliases = _aliases(data.get("aliases", {}), path)
    return Config(
        aliases={name: sources for name, (sources, _) in aliases.items()},
        defaults={name: defaults for name, (_, defaults) in aliases.items() if defaults.said()},
        queen=_table(data.get("queen", {}), "queen", QueenConfig, path),
        hive=_table(data.get("hive", {}), "hive", HiveConfig, path),
        worker=_table(data["worker"] if "worker" in own else {}, "worker", WorkerFlags, path),
        keys=_keys(data.get("keys", {}), path),
        flags={key: value for key, value in data.items() if key not in own},
        source=str(path),
    )


def _table(data: Any, name: str, kind: type[Any], path: Path) -> Any:
    if not isinstance(data, dict):
        raise wrong(path, name, f"must be a table [{name}]")
    known = [field.name for field in attrs.fields(kind)]
    values = {key.replace("-", "_"): value for key, value in data.items()}
    for key in values:
        if key not in known:
            raise wrong(path, f"{name}.{key}", f"is unknown; [{name}] takes {', '.join(known)}")
    if not values:
        return kind()
    from rbee.errors import BadInputError
    from rbee.units import size
    from rbee.wire.codec import structure

    try:
        table = structure(values, kind)
        if isinstance(table, HiveConfig) and table.memory is not None:
            size(table.memory, hint="")
        if isinstance(table, QueenConfig):
            size(table.max_waiting_size, hint="")
        return table
    except BadInputError as exc:
        raise ConfigError(
            f"{path}: [{name}]: {exc.message}", hint=f"${{EDITOR:-vi}} {path}"
        ) from exc


def _keys(data: Any, path: Path) -> dict[str, KeyConfig]:
    if not isinstance(data, dict):
        raise wrong(path, "keys", "must hold tables [keys.NAME]")
    return {name: _key(name, value, path) for name, value in data.items()}


def _key(name: str, data: Any, path: Path) -> KeyConfig:
    where = f"keys.{name}"
    if not _KEY_NAME.fullmatch(name):
        raise wrong(path, where, "must be letters, digits and ._- (at most 63)")
    key: KeyConfig = _table(data, where, KeyConfig, path)
    if bool(key.sha256) == bool(key.file):
        raise wrong(path, where, "needs either sha256 or file")
    if key.sha256 and not _DIGEST.fullmatch(key.sha256.lower()):
        raise wrong(
            path, f"{where}.sha256", "must be 64 hexadecimal digits (printf %s KEY | sha256sum)"
        )
    for limit in ("requests_at_once", "requests_per_minute"):
        if (value := getattr(key, limit)) is not None and value < 1:
            raise wrong(path, f"{where}.{limit}", f"must be at least 1, got {value}")
    return key


def _aliases(data: Any, path: Path) -> dict[str, tuple[tuple[str, ...], Defaults]]:
    if not isinstance(data, dict):
        raise wrong(path, "aliases", "must be a table [aliases]")
    return {name: read_alias(name, value, partial(wrong, path)) for name, value in data.items()}


def wrong(path: Path | str, key: str, what: str) -> ConfigError:
    """Return the error for one key of the file."""
    return ConfigError(f"{path}: key {key!r} {what}", hint=f"${{EDITOR:-vi}} {path}")
