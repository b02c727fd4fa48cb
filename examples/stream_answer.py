"""Stream an answer from a running queen in your own trio program.

    rbee-keeper queen start
    python examples/stream_answer.py "What is the capital of France?"

The queen is found by its run file; `rbee-keeper status` shows the same.
"""

import sys

import trio

from rbee.client import AsyncClient
from rbee.daemon import read_run_file
from rbee.errors import RbeeError
from rbee.home import find_home
from rbee.wire.messages import End, TaskRequest, Token


async def main(prompt: str, model: str = "smollm2-135m", engine: str | None = None) -> None:
    queen = read_run_file(find_home().queen_file)
    if queen is None:
        sys.exit("no queen runs; start one with: rbee-keeper queen start")
    token = await trio.Path(queen.token_file).read_text()
    task = TaskRequest(model=model, prompt=prompt, engine=engine, max_tokens=64)
    async with AsyncClient(queen.url, token.strip()) as client, client.stream(task) as events:
        async for event in events:
            if isinstance(event, Token):
                print(event.t, end="", flush=True)
            elif isinstance(event, End):
                print(f"\n({event.tokens_out} tokens, the first after {event.ttft_ms:.0f} ms)")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PROMPT [MODEL [ENGINE]]")
    try:
        trio.run(main, *sys.argv[1:])
    except RbeeError as error:
        sys.exit(f"error: {error}\n  hint: {error.hint}")
