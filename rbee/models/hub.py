"""Fetch a model from a hub into a directory where what came survives an interruption.

Runs as a program of its own, ``python -m rbee.models.hub ORG/REPO DIRECTORY``, so that
huggingface_hub and the transfer live and die in a child. Progress is lines of JSON on stdout, what
is wrong the last of them, with exit code 1. The hub, the token and the proxy are those of
huggingface_hub's own environment variables.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from typing import Any

import attrs

from rbee.errors import BadInputError, RbeeError
from rbee.hints import pull
from rbee.models.child import error_line
from rbee.models.preflight import check_disk
from rbee.models.progress import Printer
from rbee.models.refusals import RETRIED, Asked
from rbee.models.repository import MANIFEST, Fetched, Remote, choose, is_part
from rbee.models.transfer import Limits, StoppedError, Transfer
from rbee.units import human

AT_ONCE = 4
CONTACTS = 2


@attrs.frozen
class Hub:
    """One repository of one hub, through huggingface_hub's session."""

    asked: Asked
    limits: Limits
    api: Any
    headers: dict[str, str]

    @classmethod
    def open(cls, repo: str, revision: str, limits: Limits) -> Hub:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers

        endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        if not endpoint.startswith(("http://", "https://")):
            raise BadInputError(
                f"HF_ENDPOINT is {endpoint!r} (needed: an address such as https://mirror.example)",
                code="bad_endpoint",
                hint=f"unset HF_ENDPOINT; {pull(f'hf:{repo}')}",
            )
        headers = build_hf_headers(library_name="rbee")
        asked = Asked(repo, revision, endpoint, "authorization" in headers)
        return cls(asked, limits, HfApi(endpoint=endpoint, library_name="rbee"), headers)

    @property
    def session(self) -> Any:
        from huggingface_hub.utils import get_session

        return get_session()

    @property
    def http(self) -> Any:
        """The package that the session is of: httpx, or httpx2 since huggingface_hub 2."""
        return importlib.import_module(type(self.session).__module__.partition(".")[0])

    def url(self, file: Remote, commit: str) -> str:
        from huggingface_hub import hf_hub_url

        place = {"repo_id": self.asked.repo, "filename": file.name, "revision": commit}
        return str(hf_hub_url(**place, endpoint=self.asked.endpoint))

    # what it holds -------------------------------------------------------------------------------

    def list_files(self) -> tuple[str, list[Remote]]:
        """Return the commit and its files; the first contact, so it gives up early.

        Raises:
            RbeeError: no answer within ``limits.contact``, a refusal, nonsense.
        """
        pool = ThreadPoolExecutor(1)
        try:
            # a name server that does not answer would hold us for as long as it likes
            return pool.submit(self._list_files).result(self.limits.contact)
        except OutOfTime:
            raise self.asked.unreachable(f"no answer for {self.limits.contact:g} s") from None
        finally:
            pool.shutdown(wait=False)

    def _list_files(self) -> tuple[str, list[Remote]]:
        info = self._contact()
        commit = info.sha or self.asked.revision or "main"
        return commit, [_remote(sibling, commit) for sibling in info.siblings or ()]

    def _contact(self) -> Any:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        for contact in range(1, CONTACTS + 1):
            try:
                return self.api.model_info(
                    self.asked.repo,
                    revision=self.asked.revision or None,
                    files_metadata=True,
                    timeout=self.limits.connect,
                )
            except HFValidationError as exc:
                raise BadInputError(
                    f"hf:{self.asked.repo} cannot be the name of a repository: {exc}",
                    code="bad_reference",
                    hint="rbee-keeper model aliases",
                ) from exc
            except HfHubHTTPError as exc:
                status, headers = exc.response.status_code, exc.response.headers
                error = self.asked.refused(status, headers)
                last = status not in RETRIED
            except (self.http.ConnectError, self.http.TimeoutException) as exc:
                raise self.asked.unreachable(str(exc) or type(exc).__name__) from exc
            except self.http.RequestError as exc:
                error, last = self.asked.unreachable(f"{type(exc).__name__}: {exc}"), False
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise self.asked.nonsense(f"{type(exc).__name__}: {exc}") from exc
            if last or contact == CONTACTS:
                raise error
            time.sleep(self.limits.pause)
        raise AssertionError("unreachable")

    def completed(self, file: Remote, commit: str) -> Remote:
        """Ask for the size and hash of a file that the list says nothing about (some mirrors)."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import HfHubHTTPError

        if file.size is not None and (file.sha256 or file.git_sha1):
            return file
        try:
            found = get_hf_file_metadata(
                self.url(file, commit), headers=self.headers, timeout=self.limits.connect
            )
        except HfHubHTTPError as exc:
            raise self.asked.refused(
                exc.response.status_code, exc.response.headers, file.name
            ) from exc
        except self.http.RequestError as exc:
            raise self.asked.unreachable(f"{type(exc).__name__}: {exc}") from exc
        etag = (found.etag or "").lower()
        return attrs.evolve(
            file,
            size=found.size,
            sha256=etag if _is_hex(etag, 64) else "",
            git_sha1=etag if _is_hex(etag, 40) else "",
        )


def fetch_repository(hub: Hub, directory: Path, printer: Printer) -> Fetched:
    """Have all files that make the model in ``directory``, and write down what they are.

    Raises:
        RbeeError: see `Hub.list_files`, `choose`, `check_disk`, `Transfer.fetch`.
    """
    commit, files = hub.list_files()
    chosen = [hub.completed(file, commit) for file in choose(hub.asked.repo, files)]
    wanted = {file.part: file for file in chosen}
    _keep_only(directory, wanted)
    printer.total = sum(file.size or 0 for file in chosen)
    have = sum(_size(directory / part) for part in wanted)
    check_disk(directory, printer.total - have, what=hub.asked.name)
    began = f", {human(have)} of it are here" if have else ""
    printer.tell("fetch", f"{hub.asked.name} at {commit[:12]}, {human(printer.total)}{began}")
    download = Download(hub, commit, directory, printer, have)
    fetched = Fetched(commit, tuple(download.run(chosen)), tuple(wanted))
    printer.update(printer.total, now=True)
    fetched.save(directory)
    return fetched


@attrs.define(eq=False)
class Download:
    """Several files at a time, each in a thread of its own; ``done`` bytes are here already."""

    hub: Hub
    commit: str
    directory: Path
    printer: Printer
    done: int
    _lock: threading.Lock = attrs.field(factory=threading.Lock)
    _stop: threading.Event = attrs.field(factory=threading.Event)

    def run(self, files: Sequence[Remote]) -> list[Any]:
        """Return the files in their order; the first failure ends the others."""
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            futures = [pool.submit(self._transfer(file).fetch) for file in files]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            self._stop.set()
            _raise_first(done)
            return [future.result() for future in futures]
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _transfer(self, file: Remote) -> Transfer:
        return Transfer(
            file=file,
            path=self.directory / file.part,
            url=self.hub.url(file, self.commit),
            session=self.hub.session,
            http=self.hub.http,
            headers=self.hub.headers,
            asked=self.hub.asked,
            limits=self.hub.limits,
            count=self._count,
            tell=self.printer.tell,
            stop=self._stop,
        )

    def _count(self, gained: int) -> None:
        with self._lock:
            self.done += gained
            self.printer.update(self.done)


def _raise_first(done: Iterable[Future[Any]]) -> None:
    errors = [error for future in done if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
        raise error


def _remote(sibling: Any, commit: str) -> Remote:
    lfs = sibling.lfs
    sha256 = str(lfs.sha256).lower() if lfs else ""
    git = "" if lfs else str(sibling.blob_id or "").lower()
    size = sibling.size if sibling.size is not None or not lfs else lfs.size
    return Remote(
        name=str(sibling.rfilename),
        size=size if type(size) is int and size >= 0 else None,
        sha256=sha256 if _is_hex(sha256, 64) else "",
        git_sha1=git if _is_hex(git, 40) else "",
        commit=commit,
    )


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not set(text) - set("0123456789abcdef")


def _keep_only(directory: Path, wanted: Iterable[str]) -> None:
    """Remove what an older download left of files that have changed since."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for name in {path.name for path in directory.iterdir() if is_part(path.name)} - {*wanted}:
        (directory / name).unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    limits = Limits(**{field.name: getattr(given, field.name) for field in attrs.fields(Limits)})
    try:
        hub = Hub.open(given.repo, given.revision, limits)
        fetch_repository(hub, given.directory, Printer())
    except RbeeError as exc:
        sys.stdout.write(_without_token(error_line(exc)))
        return 1
    except Exception as exc:
        sys.stdout.write(_without_token(traceback.format_exc()))
        failed = RbeeError(
            f"cannot fetch hf:{given.repo}: {type(exc).__name__}: {exc}",
            code="download_failed",
            hint=f"rbee-keeper model pull hf:{given.repo}",
        )
        sys.stdout.write(_without_token(error_line(failed)))
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rbee.models.hub", description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--revision", default="")
    for field in attrs.fields(Limits):
        kind = int if field.name == "tries" else float
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread that still waits for a name server or a byte holds nobody up
