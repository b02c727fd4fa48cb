"""From flags to a task for the queen; what cannot work is refused before anything is started."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rbee.config import Config
from rbee.errors import BadInputError
from rbee.hints import infer
from rbee.keeper.flags import AnswerFlags, InferFlags
from rbee.keeper.start import start_settings
from rbee.model import DEFAULT_ENGINE, LOCALHOST
from rbee.wire.messages import Message, TaskRequest


def infer_task(flags: InferFlags) -> TaskRequest:
    """Make the task of ``infer``; a prompt ``-`` reads stdin.

    Raises:
        BadInputError: a value that no queen would take.
    """
    prompt = _read_stdin(flags.model) if flags.prompt == "-" else flags.prompt
    if not prompt.strip():
        raise BadInputError(
            "the prompt is empty; a text with something in it is needed",
            hint=infer(model=flags.model, prompt="What is the capital of France?"),
        )
    if flags.timeout is not None and not flags.timeout > 0:
        raise _out_of_range("timeout", flags.timeout, "above 0", 60, flags.model)
    if flags.system is None:
        return TaskRequest(prompt=prompt, raw=flags.raw, **_settings(flags, flags.model))
    if flags.raw:
        raise BadInputError(
            "--raw sends the prompt as it is, so there is no place for --system",
            hint=f"{infer('--system', flags.system, model=flags.model)}   # without --raw",
        )
    return chat_task(flags, flags.model, [Message("user", prompt)])


def chat_task(flags: AnswerFlags, model: str, messages: Iterable[Message]) -> TaskRequest:
    """Make the task of one turn of a conversation."""
    system = [Message("system", flags.system)] if flags.system else []
    return TaskRequest(messages=(*system, *messages), **_settings(flags, model))


def check_known(flags: AnswerFlags, model: str, config: Config) -> None:
    """Refuse a name that stands for no model here; another node may know it, another engine too.

    Raises:
        NotFoundError: nothing is called so.
        BadInputError: a path that holds no model, or a malformed reference.
    """
    defaults = config.defaults.get(model)
    engine = flags.engine or (defaults.engine if defaults else None) or DEFAULT_ENGINE
    if engine == DEFAULT_ENGINE and flags.node in (None, LOCALHOST):
        from rbee.models.reference import parse

        parse(_absolute(model), config.aliases)


def _settings(flags: AnswerFlags, model: str) -> dict[str, Any]:
    _check_model(model)
    _check_sampling(flags, model)
    return {
        **start_settings(flags),
        "model": _absolute(model),
        "max_tokens": flags.max_tokens,
        "temperature": flags.temperature,
        "top_p": flags.top_p,
        "top_k": flags.top_k,
        "min_p": flags.min_p,
        "repetition_penalty": flags.repetition_penalty,
        "seed": flags.seed,
        "stop": flags.stop,
    }


def _check_model(model: str) -> None:
    if not model.strip() or "\0" in model:
        raise BadInputError("the model's name is empty", hint="rbee-keeper model list")


def _absolute(model: str) -> str:
    """Make a path mean the same to daemons, which run elsewhere."""
    if "/" not in model and not Path(model).exists():
        return model
    from rbee.models.reference import absolute

    return absolute(model)


def _check_sampling(flags: AnswerFlags, model: str) -> None:
    rules: list[tuple[str, float | None, bool, str, float]] = [
        ("max-tokens", flags.max_tokens, _at_least(flags.max_tokens, 1), "at least 1", 100),
        ("temperature", flags.temperature, _at_least(flags.temperature, 0), "at least 0", 0.7),
        ("top-p", flags.top_p, flags.top_p is None or 0 < flags.top_p <= 1, "in (0, 1]", 0.9),
        ("top-k", flags.top_k, _at_least(flags.top_k, 0), "at least 0", 40),
        ("min-p", flags.min_p, flags.min_p is None or 0 <= flags.min_p <= 1, "in [0, 1]", 0.05),
        (
            "repetition-penalty",
            flags.repetition_penalty,
            flags.repetition_penalty is None or 0 < flags.repetition_penalty < float("inf"),
            "above 0",
            1.1,
        ),
    ]
    for name, value, good, needed, example in rules:
        if value is not None and not good:
            raise _out_of_range(name, value, needed, example, model)
    if "" in flags.stop:
        raise BadInputError("a --stop text is empty", hint=infer("--stop", "END", model=model))


def _at_least(value: float | None, least: float) -> bool:
    return value is None or least <= value < float("inf")


def _out_of_range(
    name: str, value: float, needed: str, example: float, model: str
) -> BadInputError:
    return BadInputError(
        f"--{name} must be {needed}, got {value}", hint=infer(f"--{name}", example, model=model)
    )


def _read_stdin(model: str) -> str:
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as exc:
        raise BadInputError(
            f"the prompt on stdin is not UTF-8: {exc}",
            hint=f"iconv -f latin1 -t UTF-8 | {infer(model=model, prompt='-')}",
        ) from exc
    return text.removesuffix("\n")
