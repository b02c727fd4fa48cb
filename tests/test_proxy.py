"""The proxy of docs/production.md, a real nginx: tokens come through it as they are made."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import rbee

DOCUMENT = Path(__file__).parents[1] / "docs" / "production.md"
MAIN = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/log;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
{server}
}}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed"),
]


def server(url: str, port: int) -> str:
    """Return what the document shows, without TLS and for this queen."""
    (text,) = re.findall(r"^```nginx\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    text = text.replace("http://127.0.0.1:8080", url)
    return re.sub(r"^ *ssl_.*\n", "", text, flags=re.MULTILINE)


@contextmanager
def open_nginx(url: str, folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(MAIN.format(folder=folder, server=server(url, port)))
    argv = ["nginx", "-p", str(folder), "-c", str(config), "-e", str(folder / "log")]
    with subprocess.Popen(argv) as process:
        try:
            wait_listening(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_listening(port: int) -> None:
    for _ in range(100):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("nginx does not listen")


def test_tokens_come_through_as_they_are_made(tmp_path: Path) -> None:
    model = "echo?rate=10"
    body = {"model": model, "prompt": "one two", "max_tokens": 8, "stream": True}
    with (
        rbee.Cluster(models=[model], engine="echo") as cluster,
        open_nginx(cluster.url, tmp_path) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        headers = {"authorization": f"Bearer {cluster.token}"}
        with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            came = [time.monotonic() for chunk in answer.iter_raw() if b"data:" in chunk]
        assert answer.status_code == 200
        assert len(came) > 4
        assert came[-1] - came[0] > 0.3  # seconds; buffered they would come at once
        assert client.get("/v2/workers", headers=headers).status_code == 404
