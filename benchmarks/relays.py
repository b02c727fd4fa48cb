"""The relays that benchmarks/relay.py measures: ours, started by itself, and others beside them.

    python benchmarks/relays.py KIND WORKER_PORT [SSH_TARGET_AS_JSON]

Runs one of ours until it is ended, and prints its port.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import venv
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from rbee.aio import open_aio
from rbee.errors import UnavailableError
from rbee.garbage import collect_rarely
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.hive import Relaying
from rbee.queen.jobs import Jobs
from rbee.queen.offer import Offer
from rbee.queen.openai import Passages, add_openai_routes
from rbee.queen.tasks import add_task_routes
from rbee.registry import Registry
from rbee.ssh import SshTarget, open_connection
from rbee.testing.hosts import Hosts
from rbee.web.client import open_client
from rbee.web.front import Front
from rbee.web.listener import open_listener
from rbee.web.out import Out
from rbee.web.poller import open_poller
from rbee.web.pump import open_pump
from rbee.web.router import App, Passing, Request
from rbee.web.server import serve_http
from rbee.web.upstream import open_upstreams
from rbee.wire.messages import WorkerInfo

TOKEN = "sk-" + hashlib.sha256(b"benchmark").hexdigest()  # LiteLLM takes no simpler one
ROUTER = "vllm-router==0.1.17"
LITELLM = "litellm[proxy]==1.106.2"

CHAT = "/v1/chat/completions"

NGINX = """
daemon off; user {user}; worker_processes 1; worker_rlimit_nofile 20000; pid {place}/nginx.pid;
error_log stderr error;
events {{ worker_connections 20000; }}
http {{
  access_log off;
  client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;
  fastcgi_temp_path {place}/fastcgi; uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
  upstream worker {{ server 127.0.0.1:{worker}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
LITELLM_CONFIG = """
model_list:
  - model_name: words
    litellm_params:
      model: openai/words
      api_base: http://127.0.0.1:{worker}/v1
      api_key: none
"""


class NotHereError(Exception):
    """A relay cannot be measured on this machine."""


# ours -----------------------------------------------------------------------------------------
@attrs.define(eq=False)
class OneHive:
    """What the queen's routes see of a hive whose one worker is ready."""

    url: str
    token: str = TOKEN
    queen_id: str = "queen"
    workers: Registry[str, WorkerInfo] = attrs.field(factory=Registry)
    failures: dict[str, WorkerInfo] = attrs.field(factory=dict)

    def running(self, node: str) -> OneHive:
        return self

    def way_to(self, url: str) -> str:
        return self.url

    def relaying(self) -> Relaying:
        return Relaying(set())


async def serve(kind: str, worker: int, target: str) -> None:
    """Be a relay of ours, and print its port."""
    collect_rarely()  # as queen-rbee does
    app = App(token=TOKEN)
    listener = open_listener("127.0.0.1", 0, exact=True)
    async with AsyncExitStack() as stack:
        if target:
            worker = await stack.enter_async_context(open_way(json.loads(target), worker))
        url = f"http://127.0.0.1:{worker}"
        front = None
        if kind == "httpx":
            client = await stack.enter_async_context(open_client(url))
            app.add("POST", CHAT, partial(pass_by_httpx, client))
        else:
            poller = await stack.enter_async_context(open_poller())
            pump = await stack.enter_async_context(open_pump(poller, 30))
            passages = make_passages(url, await stack.enter_async_context(open_upstreams(poller)))
            await stack.enter_async_context(passages.open())
            add_openai_routes(app, passages)
            await stack.enter_async_context(open_tasks(app, passages))
            front = None if kind == "hypercorn" else Front(app, pump)
        print(listener.getsockname()[1], flush=True)
        await serve_http(app, listener, front=front)


def make_passages(url: str, upstreams: Any) -> Passages:
    hive: Any = OneHive(url)
    hive.workers.set("w", WorkerInfo("w", "words", "ready", url=url, owner="queen"))
    aliases = Aliases(Path("/nowhere/config.toml"))
    unneeded: Any = None
    assignments = Assignments(hive, unneeded, aliases)
    offer = Offer(aliases, unneeded)
    return Passages(assignments, aliases, offer, upstreams, lambda: UnavailableError("it ends"))


@asynccontextmanager
async def open_tasks(app: App, passages: Passages) -> AsyncGenerator[None, None]:
    """Add ``/v2/tasks`` to the same assignments."""
    jobs = Jobs(passages._assignments, passages._aliases, passages._upstreams, passages._ending)
    add_task_routes(app, jobs)
    async with jobs.open():
        yield


@asynccontextmanager
async def open_way(found: dict[str, Any], worker: int) -> AsyncGenerator[int, None]:
    """Forward a port of ours to the worker's, as a node's ``transport = "ssh"`` does."""
    keys = (Path(found["key"]),)
    target = SshTarget(
        "node", found["host"], found["port"], found["user"], keys, Path(os.devnull),
        Path(found["known_hosts"]), "",
    )  # fmt: skip
    async with (
        open_aio() as aio,
        open_connection(target, aio) as connection,
        connection.open_forward("127.0.0.1", worker) as port,
    ):
        yield port


def target_of(hosts: Hosts) -> str:
    """Return how `open_way` gets to the host called node."""
    host = hosts["node"]
    return json.dumps({
        "host": host.address, "port": host.port, "user": host.user, "key": str(hosts.key),
        "known_hosts": str(hosts.known_hosts),
    })  # fmt: skip


async def pass_by_httpx(client: httpx.AsyncClient, request: Request) -> Passing:
    """Pass on with httpx and ASGI, as most Python relays do."""
    body = await request.json()

    async def run(out: Out) -> None:
        headers = {"content-type": "application/json"}
        asking = client.build_request("POST", CHAT, content=body, headers=headers)
        answer = await client.send(asking, stream=True)
        try:
            kind = answer.headers["content-type"].encode()
            await out.begin(answer.status_code, ((b"content-type", kind),))
            async for data in answer.aiter_raw():
                await out.emit(data)
            await out.end()
        finally:
            await answer.aclose()

    return Passing(run)


# others ---------------------------------------------------------------------------------------
def nginx(place: Path, tools: Path, port: int, worker: int) -> list[str]:
    """Return the command line of Debian's nginx, which buffers nothing."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:{tools}")
    if program is None:
        raise NotHereError("nginx is not installed (apt-get install nginx-light)")
    user = pwd.getpwuid(os.geteuid()).pw_name
    config = place / "nginx.conf"
    config.write_text(NGINX.format(place=place, port=port, worker=worker, user=user))
    return [program, "-p", str(place), "-c", str(config)]


def router(place: Path, tools: Path, port: int, worker: int, *more: str) -> list[str]:
    program = _installed(ROUTER, tools / "vllm-router") / "vllm-router"
    url = f"http://127.0.0.1:{worker}"
    metrics = ("--prometheus-port", str(free_port()))
    return [str(program), "--port", str(port), "--worker-urls", url, *metrics, *more]


def round_robin(place: Path, tools: Path, port: int, worker: int) -> list[str]:
    return router(place, tools, port, worker, "--policy", "round_robin")


def litellm(place: Path, tools: Path, port: int, worker: int) -> list[str]:
    program = _installed(LITELLM, tools / "litellm") / "litellm"
    config = place / "litellm.yaml"
    config.write_text(LITELLM_CONFIG.format(worker=worker))
    address = ("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    return [str(program), "--config", str(config), *address]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _installed(package: str, place: Path) -> Path:
    """Return where the programs of a package are, in a virtual environment of its own."""
    programs = place / "bin"
    if not (place / "installed").exists():
        venv.create(place, with_pip=True, clear=True)
        done = subprocess.run(
            [programs / "pip", "install", "--quiet", package], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise NotHereError(f"{package} cannot be installed: {last}")
        (place / "installed").touch()
    return programs


if __name__ == "__main__":
    trio.run(serve, sys.argv[1], int(sys.argv[2]), "".join(sys.argv[3:]))
