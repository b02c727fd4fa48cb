"""One process of a load: streams answers on raw sockets and says when what came.

    python benchmarks/load.py <job.json >times.json

It reads its job from the first line of stdin, says ``ready``, and begins at the second line. Used
by benchmarks/gpu.py, a few at a time, so that the one who asks is not what is measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import trio

TOKENS = re.compile(rb'"tokens_out": ?(\d+)')
ENDS = (b"event: end", b"event: error")


def head(job: dict[str, Any], size: int) -> bytes:
    lines = [
        f"POST {job['path']} HTTP/1.1", f"Host: {job['host']}:{job['port']}",
        f"Authorization: Bearer {job['token']}", "Content-Type: application/json",
        "Accept: text/event-stream", f"Content-Length: {size}", "Connection: close", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode()


async def stream(job: dict[str, Any], number: int, found: list[dict[str, Any]]) -> None:
    """Ask once; note the seconds to the first token and to the end, and the tokens."""
    body = {**job["body"], **({"job_id": f"{job['name']}-{number}"} if job["is_worker"] else {})}
    data = json.dumps(body).encode()
    began, first, last = time.monotonic(), 0.0, b""
    connection = await trio.open_tcp_stream(job["host"], job["port"])
    async with connection:
        await connection.send_all(head(job, len(data)) + data)
        async for chunk in connection:
            last = (last + chunk)[-8192:]
            if not first and b"event: token" in last:
                first = time.monotonic()
            if any(mark in last for mark in ENDS) and last.rstrip(b"\r\n0").endswith(b"}"):
                break
    tokens = TOKENS.findall(last)
    end = time.monotonic()
    if not tokens or not first:
        found.append({"failed": last[-400:].decode(errors="replace")})
    else:
        found.append({"ttft": first - began, "began": began, "end": end, "tokens": int(tokens[-1])})


async def main() -> None:
    job = json.loads(sys.stdin.readline())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    found: list[dict[str, Any]] = []
    async with trio.open_nursery() as nursery:
        for number in range(job["streams"]):
            nursery.start_soon(stream, job, number, found)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    trio.run(main)
