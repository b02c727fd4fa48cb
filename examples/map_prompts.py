"""Map 200 prompts over several workers, with a progress bar.

    python examples/map_prompts.py [MODEL [ENGINE [WORKERS]]]

The queen gives each request to the worker with the fewest. With `nodes=["gpu1", "gpu2"]` and
`cluster.load(model, node="gpu1")` the workers are on other machines (`rbee-keeper node add`).
"""

import sys
from functools import partial

import trio

import rbee

PROMPTS = [f"Give me a fact about the number {number}." for number in range(200)]
AT_ONCE = 32


async def main(model: str = "smollm2-135m", engine: str = "vllm", workers: str = "2") -> None:
    async with rbee.open_cluster(engine=engine) as cluster:
        async with trio.open_nursery() as nursery:
            for _ in range(int(workers)):
                nursery.start_soon(cluster.load, model)
        answers = await map_prompts(cluster.client, model)
    at_work = {answer.worker_id for answer in answers.values()}
    print(f"{len(answers)} answers from {len(at_work)} workers; the first: {answers[PROMPTS[0]]}")


async def map_prompts(client: rbee.AsyncClient, model: str) -> dict[str, rbee.Answer]:
    answers: dict[str, rbee.Answer] = {}
    limit = trio.CapacityLimiter(AT_ONCE)

    async def answer(prompt: str) -> None:
        async with limit:
            answers[prompt] = await client.infer(model, prompt, max_tokens=16)
        show_progress(len(answers), len(PROMPTS))

    async with trio.open_nursery() as nursery:
        for prompt in PROMPTS:
            nursery.start_soon(answer, prompt)
    return answers


def show_progress(done: int, total: int) -> None:
    bar = "#" * (40 * done // total)
    tell = partial(print, file=sys.stderr, flush=True)
    tell(f"\r[{bar:<40}] {done}/{total}", end="\n" if done == total else "")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
