"""``--engine-arg key=value``: from the user's words to those of vLLM's command line.

vLLM's own parser judges names and values (`rbee.worker.vllm_engine`); here only what rbee decides
itself is refused, which needs no vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from rbee.errors import BadInputError
from rbee.hints import infer

# What rbee decides itself; each with the place where a user sets it.
OURS = {
    "model": "--model", "model-tag": "--model", "served-model-name": "--model",
    "tensor-parallel-size": "--device", "device-ids": "--device",
    "max-model-len": "--max-model-len", "dtype": "--dtype",
    "kv-cache-memory-bytes": "--kv-cache", "max-num-seqs": "--max-num-seqs",
    "config": "--engine-arg",
}  # fmt: skip
# What belongs to a server that vLLM would run: rbee's answers instead.
SERVER = {
    "help", "headless", "grpc", "grpc-port", "host", "port", "uds", "root-path", "api-key",
    "api-server-count", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs",
    "ssl-ciphers", "enable-ssl-refresh", "uvicorn-log-level", "data-parallel-supervisor-port",
}  # fmt: skip


def engine_options(engine_args: Mapping[str, str]) -> dict[str, str]:
    """Return the options under vLLM's names: hyphens, and ``no-x`` as ``x=false``."""
    options: dict[str, str] = {}
    for key, value in engine_args.items():
        first, dot, rest = key.lstrip("-").partition(".")
        name = first.replace("_", "-") + dot + rest
        if name.startswith("no-") and is_switch(value):
            name, value = name[3:], "true" if is_off(value) else "false"
        options[name] = value
    return options


def is_switch(value: str) -> bool:
    return value.lower() in ("true", "false", "")


def is_off(value: str) -> bool:
    return value.lower() == "false"


def check_ours(options: Mapping[str, str]) -> None:
    """Refuse the options that rbee decides; each error names the flag to use instead."""
    for key in options:
        name = key.partition(".")[0].rstrip("+")
        if flag := OURS.get(name):
            raise BadInputError(
                f"--engine-arg {name} is decided by rbee; use {flag} instead",
                hint="rbee-keeper infer --help",
            )
        if name in SERVER:
            raise BadInputError(
                f"--engine-arg {name} is of vLLM's own server, which rbee does not run: rbee's "
                "daemons answer instead",
                hint=f"{infer()}   # without --engine-arg {name}",
            )


def option_word(key: str, value: str) -> str:
    """Write one option for vLLM's parser: ``--key``, ``--no-key`` or ``--key=value``."""
    if "." in key or not is_switch(value):
        return f"--{key}={value}"
    return f"--no-{key}" if is_off(value) else f"--{key}"


def spread_lists(argv: Iterable[str], several: Collection[str]) -> list[str]:
    """Give each item of ``--key=[JSON list]`` a word of its own, for the options in ``several``."""
    words: list[str] = []
    for word in argv:
        key, _, value = word.partition("=")
        items = _items(value) if key in several else None
        words += [word] if items is None else [key, *items]
    return words


def _items(text: str) -> list[str] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, list):
        return None
    return [item if isinstance(item, str) else json.dumps(item) for item in found]


def refused(message: str, known: Collection[str]) -> BadInputError:
    """Tell what vLLM's parser said in the words of ``--engine-arg``.

    ``known``: the options that it has, with their dashes.
    """
    if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        option, equals, value = match[1].split()[0].partition("=")
        return _unknown(option, equals + value, known)
    if match := re.fullmatch(r"argument (--[^\s/:]+)[^:\s]*: (.*)", message, re.DOTALL):
        return _bad_value(match[1].removeprefix("--"), match[2])
    return BadInputError(f"vLLM refuses an option: {message}", hint="rbee-keeper infer --help")


def _unknown(option: str, value: str, known: Collection[str]) -> BadInputError:
    name = option.removeprefix("--")
    if (positive := name.removeprefix("no-")) != name and f"--{positive}" in known:
        return BadInputError(
            f"vLLM's option {positive} is no switch, so it cannot be turned off",
            hint=f"{infer()}   # without --engine-arg {name}",
        )
    names = {found.removeprefix("--") for found in known} - SERVER
    near = [OURS.get(found, f"--engine-arg {found}") for found in get_close_matches(name, names, 1)]
    return BadInputError(
        f"vLLM has no option {name}" + "".join(f"; did you mean {found}?" for found in near),
        hint="".join(infer(*(found + value).split(" ", 1)) for found in near)
        or f"{infer()}   # without --engine-arg {name}",
    )


def _bad_value(name: str, why: str) -> BadInputError:
    why = re.sub(r"<function loads at 0x\w+>", "JSON", why)
    hint = "rbee-keeper infer --help"
    if why.startswith("ignored explicit argument"):
        given = why.removeprefix("ignored explicit argument ")
        why = f"it is a switch (needed: true or false), got {given}"
        hint = infer("--engine-arg", f"{name}=true")
    if why.startswith("expected "):
        why = f"it needs a value ({why})"
    return BadInputError(f"vLLM refuses --engine-arg {name}: {why}", hint=hint)
