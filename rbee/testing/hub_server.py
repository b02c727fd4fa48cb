"""A model hub on loopback that fails on demand, for tests and benchmarks.

It speaks what huggingface_hub asks: a model's description, HEAD and GET of its files with ranges,
commits, hashes and redirects. ``python -m rbee.testing.hub_server ORG/REPO=DIRECTORY …`` serves
directories until its stdin closes and prints the address for ``HF_ENDPOINT``.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs

BLOCK = 2**20
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@attrs.frozen
class Fault:
    """What goes wrong with one GET of a file, after ``at`` bytes of the answer's body.

    Attributes:
        kind: ``status`` (answers ``status``), ``stall``, ``reset``, ``short`` (a whole answer with
            less in it), ``wrong`` (other bytes), ``long`` (more than there is), ``no_range``.
    """

    kind: str
    at: int = 0
    status: int = 0
    error: str = ""


@attrs.define(eq=False)
class Repo:
    """One model: file names and their bytes, or where those lie on the disk.

    Attributes:
        lfs: names whose sha256 is told; the others have git's hash.
        bare: tell names only, as some mirrors do.
        redirect: where files really are, such as another server's address.
    """

    files: dict[str, bytes | Path]
    commit: str = "c0ffee" + "0" * 34
    revisions: tuple[str, ...] = ("main",)
    token: str = ""
    gated: bool = False
    bare: bool = False
    redirect: str = ""
    lfs: tuple[str, ...] = (".safetensors",)

    def size(self, name: str) -> int:
        found = self.files[name]
        return len(found) if isinstance(found, bytes) else found.stat().st_size

    def blocks(self, name: str, offset: int = 0) -> Iterator[bytes]:
        found = self.files[name]
        if isinstance(found, bytes):
            yield found[offset:]
            return
        with found.open("rb") as file:
            file.seek(offset)
            while block := file.read(BLOCK):
                yield block

    def etag(self, name: str) -> str:
        if name.endswith(self.lfs):
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % self.size(name), usedforsecurity=False)
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()


@attrs.frozen
class Request:
    method: str
    path: str
    range: str
    token: str


@attrs.define(eq=False)
class HubServer:
    """What is served, what is to fail, and what was asked.

    Attributes:
        faults: by file name; the first one is used up by the next GET.
        failures: statuses for the next requests of descriptions.
        garbage: what comes in place of every description.
        sent: bytes of bodies, by file name.
        pace: seconds that each `BLOCK` of a file takes.
    """

    repos: dict[str, Repo] = attrs.field(factory=dict)
    faults: dict[str, list[Fault]] = attrs.field(factory=dict)
    failures: list[int] = attrs.field(factory=list)
    garbage: bytes = b""
    requests: list[Request] = attrs.field(factory=list)
    sent: Counter[str] = attrs.field(factory=Counter)
    pace: float = 0.0
    url: str = ""
    closing: threading.Event = attrs.field(factory=threading.Event)
    etags: dict[tuple[str, str], str] = attrs.field(factory=dict)

    @contextmanager
    def serve(self, port: int = 0, host: str = "127.0.0.1") -> Iterator[HubServer]:
        """Answer while the body runs, on loopback or where throw-away hosts see this machine."""
        server = _Server((host, port), _Handler)
        server.hub = self
        self.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def gets(self, name: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}")]

    def etag(self, repo: str, name: str) -> str:
        if (repo, name) not in self.etags:
            self.etags[repo, name] = self.repos[repo].etag(name)
        return self.etags[repo, name]


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server.hub
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        hub.requests.append(Request(self.command, path, self.headers.get("range", ""), token))
        for pattern, answer in ((_API, self._describe), (_TREE, self._list), (_FILE, self._file)):
            if match := pattern.fullmatch(path):
                repo = hub.repos.get(match["repo"])
                if repo is None:
                    self._refuse(404 if token else 401, "RepoNotFound")
                elif repo.token and token != repo.token:
                    self._refuse(401)
                elif match["revision"] not in (None, repo.commit, *repo.revisions):
                    self._refuse(404, "RevisionNotFound")
                else:
                    answer(match["repo"], repo, match)
                return
        self._refuse(404)

    # answers -------------------------------------------------------------------------------------

    def _describe(self, name: str, repo: Repo, match: re.Match[str]) -> None:
        if self.server.hub.failures:
            self._refuse(self.server.hub.failures.pop(0))
            return
        siblings = [self._sibling(name, repo, file) for file in repo.files]
        told = json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode()
        self._json(self.server.hub.garbage or told)

    def _list(self, name: str, repo: Repo, match: re.Match[str]) -> None:
        """Answer what `hf download` asks for; rbee does not."""
        files: list[dict[str, Any]] = []
        for file in repo.files:
            etag, size = self.server.hub.etag(name, file), repo.size(file)
            files.append({"type": "file", "path": file, "oid": etag[:40], "size": size})
            if len(etag) == 64:
                files[-1]["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
        self._json(json.dumps(files).encode())

    def _json(self, body: bytes) -> None:
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _sibling(self, name: str, repo: Repo, file: str) -> dict[str, Any]:
        told: dict[str, Any] = {"rfilename": file}
        if repo.bare:
            return told
        etag, size = self.server.hub.etag(name, file), repo.size(file)
        if len(etag) == 64:
            told["lfs"] = {"sha256": etag, "size": size, "pointerSize": 134}
        return told | {"size": size, "blobId": etag[:40]}

    def _file(self, name: str, repo: Repo, match: re.Match[str]) -> None:
        file = match["name"]
        hub = self.server.hub
        if repo.gated:
            self._refuse(403, "GatedRepo")
        elif file not in repo.files:
            self._refuse(404, "EntryNotFound")
        elif self.command == "HEAD":
            self._head(200, self._about(name, repo, file))
        elif repo.redirect:
            self._head(302, {"Location": repo.redirect + self.path, "Content-Length": "0"})
        else:
            faults = hub.faults.get(file)
            self._send(name, repo, file, faults.pop(0) if faults else Fault(""))

    def _about(self, name: str, repo: Repo, file: str) -> dict[str, str]:
        etag, size = self.server.hub.etag(name, file), str(repo.size(file))
        about = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit, "Content-Length": size}
        if len(etag) == 64:
            about |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": size}
        return about

    def _send(self, name: str, repo: Repo, file: str, fault: Fault) -> None:
        if fault.kind == "status":
            self._refuse(fault.status, fault.error)
            return
        size = repo.size(file)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        offset = int(asked[1]) if asked and fault.kind != "no_range" else 0
        if offset >= size > 0:
            self._refuse(416)
            return
        about = self._about(name, repo, file)
        length = size - offset
        if fault.kind == "short":
            length = min(length, fault.at)
        if fault.kind == "long":
            length += 10
        about["Content-Length"] = str(length)
        if offset:
            about["Content-Range"] = f"bytes {offset}-{size - 1}/{size}"
        self._head(206 if offset else 200, about)
        self._body(repo, file, offset, length, fault)

    def _body(self, repo: Repo, file: str, offset: int, length: int, fault: Fault) -> None:
        hub = self.server.hub
        broken = fault.kind in ("stall", "reset") or (fault.kind == "no_range" and fault.at)
        limit = fault.at if broken else length
        for block in repo.blocks(file, offset):
            piece = block[:limit]
            if fault.kind == "wrong":
                piece = bytes(len(piece))
            self.wfile.write(piece)
            hub.closing.wait(hub.pace)
            hub.sent[file] += len(piece)
            limit -= len(piece)
            if not limit:
                break
        if fault.kind == "long":
            self.wfile.write(b"0123456789")
        if fault.kind == "stall":
            hub.closing.wait()
            self.close_connection = True
        elif fault.kind == "reset":
            self._reset()
        elif broken:
            self.close_connection = True

    # pieces --------------------------------------------------------------------------------------

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, error: str = "") -> None:
        told = {"X-Error-Code": error, "X-Error-Message": f"{error}!"} if error else {}
        self._head(status, {"Content-Length": "0"} | told)

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def read_repo(directory: Path) -> Repo:
    """Serve what lies in a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return Repo({str(path.relative_to(directory)): path for path in files})


def main(argv: Sequence[str] | None = None) -> int:
    hub = HubServer()
    for word in sys.argv[1:] if argv is None else argv:
        name, _, directory = word.partition("=")
        hub.repos[name] = read_repo(Path(directory))
    with hub.serve():
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
