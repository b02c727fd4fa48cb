"""Ask two models the same, in a plain script.

python examples/compare_models.py "What is a bee?" [MODEL MODEL [ENGINE]]
"""

import sys

import rbee


def main(
    prompt: str, one: str = "smollm2-135m", two: str = "qwen2.5-0.5b", engine: str = "vllm"
) -> None:
    with rbee.Cluster(models=[one, two], engine=engine) as cluster:
        for model in (one, two):
            answer = cluster.client.infer(model, prompt, max_tokens=64, temperature=0)
            speed = answer.tokens_out / max(answer.duration_ms, 1) * 1000
            print(f"{model} ({speed:.0f} tokens/s): {answer}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PROMPT [MODEL MODEL [ENGINE]]")
    main(*sys.argv[1:])
