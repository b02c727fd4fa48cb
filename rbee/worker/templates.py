"""No processor is looked for where a model has none: its chat template is the tokenizer's.

Before the first chat vLLM asks transformers for the model's processor, which for a model of text
only reads the whole tokenizer a second time, to find that it is no processor.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
CONFIGS = ("config.json", "tokenizer_config.json")


def skip_processors() -> None:
    """Have vLLM look for the processors of those models only that may have one."""
    try:
        from vllm.renderers import hf

        look = hf._try_get_processor_chat_template
        if not hasattr(look, "__wrapped__"):
            hf._try_get_processor_chat_template = _only_where_one_may_be(look)
    except Exception as exc:  # another version; it is for speed only
        log.info("vLLM looks for processors itself: %s", exc)


def _only_where_one_may_be(look: Callable[..., str | None]) -> Callable[..., str | None]:
    @functools.wraps(look)
    def wrapper(tokenizer: Any, *args: Any, **options: Any) -> str | None:
        if not may_have_processor(Path(str(tokenizer.name_or_path))):
            return None
        return look(tokenizer, *args, **options)

    return wrapper


def may_have_processor(directory: Path) -> bool:
    """Tell whether transformers could find a processor there; True where that is not clear."""
    if any((directory / name).exists() for name in FILES):
        return True
    try:
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

        known = [json.loads((directory / name).read_bytes()) for name in CONFIGS]
        return known[0]["model_type"] in PROCESSOR_MAPPING_NAMES or any(map(_names_one, known))
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return True


def _names_one(config: dict[str, Any]) -> bool:
    return "processor_class" in config or "AutoProcessor" in config.get("auto_map", ())
