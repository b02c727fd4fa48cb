"""The OpenAI client against a cluster of your own.

pip install openai
python examples/openai_client.py "What is a bee?" [MODEL [ENGINE]]
"""

import sys

from openai import OpenAI

import rbee


def main(prompt: str, model: str = "smollm2-135m", engine: str = "vllm") -> None:
    with rbee.Cluster(models=[model], engine=engine) as cluster:
        client = OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.token)
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=64,
            stream=True,
        )
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PROMPT [MODEL [ENGINE]]")
    main(*sys.argv[1:])
