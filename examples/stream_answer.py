"""Stream an answer from a running queen in your own trio program.

    rbee-keeper queen start
    python examples/stream_answer.py "What is the capital of France?"

The queen is found by its run file; `rbee-keeper status` shows the same.
"""

import sys

import trio

import rbee


async def main(prompt: str, model: str = "smollm2-135m", engine: str = "vllm") -> None:
    client = rbee.AsyncClient()
    async with client.stream(model, prompt, engine=engine, max_tokens=64) as events:
        async for event in events:
            if isinstance(event, rbee.Token):
                print(event.t, end="", flush=True)
            elif isinstance(event, rbee.End):
                print(f"\n({event.tokens_out} tokens, the first after {event.ttft_ms:.0f} ms)")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PROMPT [MODEL [ENGINE]]")
    try:
        trio.run(main, *sys.argv[1:])
    except rbee.RbeeError as error:
        sys.exit(f"error: {error}\n  hint: {error.hint}")
