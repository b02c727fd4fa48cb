"""A model small enough for every test: two random layers and a tokenizer, 1 MB in 0.2 s.

It answers nonsense, but through the same files, code paths and chat template as a real one. At
temperature 0 it never ends by itself and says words, not halves of characters. The same call
always writes the same bytes. Needs numpy, safetensors and tokenizers; no torch.
``python -m rbee.testing.tiny_model DIR`` makes one by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 1024
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 2, 2, 1, 32
CONTEXT = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS, EOS = 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEMS = (
    "ask answer call carry clear cook count cover dream drift end enter fill float follow gather "
    "grow hand help hold hum join jump keep kick land laugh lead learn lift light listen look mark "
    "meet melt mend move need nest open order paint park pass play plant point pour pull push rain "
    "reach read rest return roll row sail search seem send shout show sing sleep smell speak spell "
    "stand start stay swarm talk taste teach tell think throw touch train travel turn visit wait "
    "walk wander warm wash watch water whisper wish wonder work yell "
    "bloom borrow burn climb collect crawl dance deliver discover drink gleam glow harvest hurry "
    "inspect murmur nod protect remember scatter"
)
ENDINGS = ("", "s", "ing", "er")
TEXT = (
    " ".join(stem + ending for stem in STEMS.split() for ending in ENDINGS),
    "Once upon a time there was a bee who lived in a hive with a queen and many workers.",
    "Every morning the keeper came to the garden and looked after the flowers and the bees.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of France? The capital of France is Paris.",
    "Hello, world! How are you today? I am a very small model, and I know very little.",
    "One two three four five six seven eight nine ten; 0 1 2 3 4 5 6 7 8 9.",
    "When the queen dies, every hive and every worker ends with her, and nothing is left behind.",
)


def write_tiny_model(directory: Path) -> Path:
    """Write a loadable model into ``directory``, made when missing, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(directory)
    _write_weights(directory, vocabulary)
    _write_json(directory / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    _write_json(directory / "config.json", _config())
    return directory


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }


def _write_tokenizer(directory: Path) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[EOS],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _write_weights(directory: Path, vocabulary: dict[str, int]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Any:
        return (random.standard_normal((rows, columns)) * 0.05).astype(np.float32)

    ones: Any = np.ones(HIDDEN, np.float32)
    head = matrix(VOCABULARY, HIDDEN)
    # a zero row has logit 0, which is never the greatest of a thousand
    head[[number for token, number in vocabulary.items() if not _is_text(token)]] = 0
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": head,
        "model.norm.weight": ones,
    }
    for number in range(LAYERS):
        layer = {
            "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            "mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            "mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
            "input_layernorm.weight": ones,
            "post_attention_layernorm.weight": ones,
        }
        weights |= {f"model.layers.{number}.{name}": value for name, value in layer.items()}
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})


def _is_text(token: str) -> bool:
    """Tell whether a token is text by itself (``Ġ`` is the byte-level alphabet's space)."""
    return token not in SPECIAL and token.removeprefix("Ġ").isascii() and token != "Ġ"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 1 or given[0].startswith("-"):
        sys.stderr.write("usage: python -m rbee.testing.tiny_model DIR\n")
        return 2
    sys.stdout.write(f"{write_tiny_model(Path(given[0]))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
