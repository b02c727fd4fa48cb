"""A real browser at a real queen: what pages of an allowed, another and a rebound origin can do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from rbee.home import Home
from rbee.testing.processes import LeakCheck, carriers
from tests.cascade.keeper import run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PATIENCE = 60.0  # seconds; a browser starts slowly on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no browser is installed (apt-get install chromium)"),
]

# One server is three origins. What the rebound one asks of itself reaches the queen, as it does
# when the page's name leads to its address by then.
ALLOWED, OTHER, REBOUND = "localhost", "127.0.0.1", "evil.test"
FRAMES = "".join(
    f'<iframe src="http://{host}:%(port)d/page"></iframe>' for host in (OTHER, REBOUND)
)
PAGE = """<!doctype html><title>page</title><script>
const auth = {Authorization: "Bearer %(token)s"}, json = {"Content-Type": "application/json"};
const task = JSON.stringify({model: "echo", engine: "echo", prompt: "hi"});
const queen = location.hostname == "evil.test" ? "" : "http://127.0.0.1:%(queen)d";
const bad = location.hostname == "localhost" ? "{}" : task;
const post = (body, headers, mode) => ["/v2/tasks", {method: "POST", body, headers, mode}];
const cases = {
  "health": ["/health", {}],
  "health, opaque": ["/health", {mode: "no-cors"}],
  "hives": ["/v2/hives", {}],
  "hives, token": ["/v2/hives", {headers: auth}],
  "text": post(task),
  "text, opaque": post(task, {}, "no-cors"),
  "text, token": post(task, auth),
  "form": post(new URLSearchParams({model: "echo"})),
  "json": post(task, json),
  "json, token": post(bad, {...auth, ...json}),
  "shutdown, opaque": ["/v1/admin/shutdown", {method: "POST", mode: "no-cors"}],
};
(async () => {
  const results = {};
  for (const [name, [path, options]] of Object.entries(cases)) {
    try {
      const answer = await fetch(queen + path, options);
      results[name] = answer.type == "opaque" ? "opaque" : answer.status;
    } catch (error) { results[name] = "blocked"; }
  }
  await fetch("/results", {method: "POST", body: JSON.stringify(results)});
})();
</script>"""

RESULTS = {
    # what each page got, and could read: a status; an answer without content; nothing
    ALLOWED: {
        "health": 200, "health, opaque": "opaque", "hives": 401, "hives, token": 200,
        "text": 401, "text, opaque": "opaque", "text, token": 415, "form": 401,
        "json": 401, "json, token": 400, "shutdown, opaque": "opaque",
    },
    OTHER: {
        "health": "blocked", "health, opaque": "opaque", "hives": "blocked",
        "hives, token": "blocked", "text": "blocked", "text, opaque": "opaque",
        "text, token": "blocked", "form": "blocked", "json": "blocked", "json, token": "blocked",
        "shutdown, opaque": "opaque",
    },
}  # fmt: skip
RESULTS[REBOUND] = dict.fromkeys(RESULTS[OTHER], 403)


class Pages(ThreadingHTTPServer):
    """Serves the pages and takes what they tell; ``complete`` is set when all have."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.queen = self.token = ""
        self.results: dict[str, Any] = {}
        self.complete = threading.Event()

    @property
    def queen_port(self) -> int:
        return urlsplit(self.queen).port or 0

    def page(self, path: str) -> str:
        values = {"token": self.token, "queen": self.queen_port, "port": self.server_port}
        return (PAGE + (FRAMES if path == "/" else "")) % values


class Handler(BaseHTTPRequestHandler):
    server: Pages

    def do_GET(self) -> None:
        if self.path in ("/", "/page"):
            self._send(200, self.server.page(self.path).encode())
        else:
            self._pass_on()

    def do_POST(self) -> None:
        if self.path != "/results":
            self._pass_on()
            return
        host = self.headers["host"].rpartition(":")[0]
        self.server.results[host] = json.loads(self._body())
        self._send(204)
        if len(self.server.results) == len(RESULTS):
            self.server.complete.set()

    def _pass_on(self) -> None:
        if not self.headers["host"].startswith(REBOUND):
            self._send(404)
            return
        queen = HTTPConnection("127.0.0.1", self.server.queen_port, timeout=PATIENCE)
        queen.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            queen.putheader(name, value)
        queen.endheaders(self._body())
        answer = queen.getresponse()
        self._send(answer.status, answer.read())
        queen.close()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _send(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""


@contextmanager
def serving_pages() -> Iterator[Pages]:
    with Pages() as pages:
        thread = threading.Thread(target=pages.serve_forever)
        thread.start()
        try:
            yield pages
        finally:
            pages.shutdown()
            thread.join()


@contextmanager
def browsing(url: str, profile: Path) -> Iterator[None]:
    argv = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-breakpad", "--disable-background-networking", "--no-first-run",
        "--no-proxy-server", f"--user-data-dir={profile}",
        f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1, MAP {ALLOWED} 127.0.0.1", url,
    ]  # fmt: skip
    log = (profile.parent / "browser.log").open("wb")
    # It leaves its socket there, under a path that has to be short.
    with log, tempfile.TemporaryDirectory(prefix="rbee-b-", ignore_cleanup_errors=True) as place:
        env = os.environ | {"TMPDIR": place}
        popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        try:
            yield
        finally:
            popen.terminate()
            popen.wait(PATIENCE)


def test_pages_reach_the_queen_only_from_an_allowed_origin_with_the_token(
    home: Home, nonce: str, leaks: LeakCheck, tmp_path: Path
) -> None:
    with serving_pages() as pages:
        origin = f"http://{ALLOWED}:{pages.server_port}"
        env = os.environ | {"RBEE_ALLOW_ORIGIN": origin}
        started = run("queen", "start", "--port", "0", env=env)
        assert started.code == 0, started.err
        leaks.tree.refresh(*carriers(nonce))
        pages.queen, pages.token = started.out.strip(), home.token_file.read_text().strip()
        with browsing(f"{origin}/", tmp_path / "profile"):
            assert pages.complete.wait(PATIENCE), (tmp_path / "browser.log").read_text()
    assert pages.results == RESULTS
    with httpx.Client(headers={"authorization": f"Bearer {pages.token}"}) as client:
        for path in ("/v2/hives", "/v2/workers"):
            assert client.get(pages.queen + path).json() == []
        assert "rbee_queen_jobs 0.0\n" in client.get(f"{pages.queen}/metrics").text
    assert "job-" not in home.log_file("queen").read_text()
    assert run("queen", "stop").code == 0
