"""A web app that owns a cluster: it is there when the app is, and gone when the app is.

    python examples/web_app.py [MODEL [ENGINE]]
    curl -d 'What is a bee?' http://127.0.0.1:8000/

Any ASGI framework has a place for what lives as long as the app, its *lifespan*; here it is bare.
"""

import signal
import sys
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

import rbee


class App:
    def __init__(self, model: str, engine: str) -> None:
        self.model = model
        self.engine = engine

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["type"] == "http":
            await self.answer(receive, send)

    async def live(self, receive: Any, send: Any) -> None:
        await receive()  # lifespan.startup
        try:
            async with rbee.open_cluster(models=[self.model], engine=self.engine) as cluster:
                self.client = cluster.client
                await send({"type": "lifespan.startup.complete"})
                await receive()  # lifespan.shutdown
        except rbee.RbeeError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})

    async def answer(self, receive: Any, send: Any) -> None:
        message = await receive()
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        prompt = message.get("body", b"").decode() or "Hello"
        async for text in self.client.stream(self.model, prompt, max_tokens=64).text():
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"\n"})


async def main(model: str = "smollm2-135m", engine: str = "vllm", port: str = "8000") -> None:
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.startup_timeout = 600  # a model may have to be fetched first
    await serve(App(model, engine), config, shutdown_trigger=until_told)


async def until_told() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
