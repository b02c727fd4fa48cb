"""Run a cluster inside your own trio program: it lives as long as the block.

    python examples/embed_trio.py [MODEL [ENGINE]]

However this program ends, by its end, an error, Ctrl+C or `kill -9`, no worker outlives it.
"""

import sys

import trio

import rbee

QUESTIONS = ("What is a bee?", "What is a hive?", "What is a queen?")


async def main(model: str = "smollm2-135m", engine: str = "vllm") -> None:
    async with (
        rbee.open_cluster(models=[model], engine=engine) as cluster,
        trio.open_nursery() as nursery,
    ):
        for question in QUESTIONS:
            nursery.start_soon(ask, cluster.client, model, question)


async def ask(client: rbee.AsyncClient, model: str, question: str) -> None:
    answer = await client.infer(model, question, max_tokens=32)
    print(f"{question} {answer} ({answer.duration_ms:.0f} ms on {answer.node})")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
