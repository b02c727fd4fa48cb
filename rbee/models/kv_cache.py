"""What a model's KV cache takes, read from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from rbee.models.inspect import read_json

KV_BLOCK = 128  # tokens in one block of the KV cache
IN_FLIGHT = 16384  # tokens that a window keeps besides itself: two batches that are being computed

STATES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")  # they keep no tokens
WINDOWS = ("sliding_attention", "chunked_attention")
PARTS = ("text_config", "llm_config", "language_config")


@attrs.frozen
class CacheShape:
    """What the KV cache takes on one device; all zeros where the config does not say.

    Attributes:
        token: bytes of one token in the layers that keep every token.
        window_token: the same in the layers that keep only the last ``window``.
    """

    token: int = 0
    window_token: int = 0
    window: int = 0
    block: int = KV_BLOCK

    def __bool__(self) -> bool:
        return bool(self.token or self.window_token)

    def size(self, context: int, sequences: int = 1) -> int:
        """Return the bytes for so many requests of full length; one block is the engine's own."""
        blocks = sequences * self._blocks(context) + 1
        held = self._blocks(min(context, self.window + IN_FLIGHT)) + 1
        window_blocks = sequences * held + 1
        return self.block * (blocks * self.token + window_blocks * self.window_token)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)


def cache_shape(
    config: Mapping[str, Any], item: int, *, devices: int = 1, block: int = KV_BLOCK
) -> CacheShape:
    """Return the shape for values of ``item`` bytes, with the heads split over ``devices``."""
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    if latent := _number(config, "kv_lora_rank"):  # MLA: one vector per token, on every device
        token = (latent + _number(config, "qk_rope_head_dim")) * item
        return CacheShape(layers * token, block=block)
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    if not (layers and heads and hidden):
        return CacheShape(block=block)
    kv_heads = _number(config, "num_key_value_heads", "num_kv_heads") or heads
    head_dim = _number(config, "head_dim") or hidden // heads
    token = 2 * -(-kv_heads // devices) * head_dim * item
    full, windowed = _layers(config, layers)
    window = _number(config, "sliding_window", "attention_chunk_size")
    return CacheShape(full * token, windowed * token, window if windowed else 0, block)


def read_config(directory: Path) -> dict[str, Any]:
    """Return the language model's part of ``config.json``."""
    config = read_json(directory / "config.json")
    found = (config.get(part) for part in PARTS)
    return next((part for part in found if isinstance(part, dict)), config)


def _layers(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """Count the layers that keep all tokens, and those that keep a window of them."""
    kinds = config.get("layer_types")
    has_window = bool(_number(config, "sliding_window", "attention_chunk_size"))
    if not isinstance(kinds, list):
        is_windowed = has_window and config.get("model_type") in ("mistral", "mixtral")
        return (0, layers) if is_windowed else (layers, 0)
    windowed = sum(kind in WINDOWS for kind in kinds) if has_window else 0
    return len(kinds) - windowed - sum(kind in STATES for kind in kinds), windowed


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first of these that is a number; 0 if none is."""
    values = (config.get(key) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), 0)
