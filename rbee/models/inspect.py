"""Read what a model directory says about itself, without torch, and find what is broken in it.

Only heads are read: ``config.json``, the tokenizer's settings, each safetensors file's header. A
file that was cut short or overwritten shows there, before an engine trips over it.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

from rbee.errors import BadInputError
from rbee.hints import ls

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8", "F8_E5M2": "float8", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_len")
MAX_HEADER = 100_000_000  # the format's own limit
_INDEX = "model.safetensors.index.json"


@attrs.frozen
class Inspection:
    """What a loadable directory holds.

    Attributes:
        dtype: of most of the weights' bytes.
        context: longest sequence in tokens; 0 when the config does not say.
        weight_bytes: the tensors alone; ``size`` counts all files.
        files: name and size of each file, by name.
    """

    directory: Path
    architecture: str
    dtype: str
    parameters: int
    weight_bytes: int
    context: int
    has_chat_template: bool
    size: int
    files: tuple[tuple[str, int], ...]


@attrs.frozen
class Weights:
    """One safetensors file's header, summed up."""

    parameters: int
    bytes_by_dtype: Counter[str]


def inspect_model(directory: Path) -> Inspection:
    """Check and describe a model directory.

    Raises:
        BadInputError: names the file that is missing or corrupt.
    """
    config = read_json(directory / "config.json")
    weights = [read_header(path) for path in weight_files(directory)]
    by_dtype = sum((found.bytes_by_dtype for found in weights), Counter[str]())
    files = tuple(sorted((p.name, p.stat().st_size) for p in directory.iterdir() if p.is_file()))
    return Inspection(
        directory=directory,
        architecture=_architecture(config, directory),
        dtype=DTYPES.get(by_dtype.most_common(1)[0][0], "unknown"),
        parameters=sum(found.parameters for found in weights),
        weight_bytes=by_dtype.total(),
        context=_context(config),
        has_chat_template=_has_chat_template(directory),
        size=sum(size for _, size in files),
        files=files,
    )


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files; each one that the index names must be there."""
    found = sorted(directory.glob("*.safetensors"))
    index = directory / _INDEX
    if index.is_file():
        wanted = set(_index_files(index))
        if missing := sorted(wanted - {path.name for path in found}):
            raise _corrupt(index, f"it names {missing[0]}, which is not there", "missing_weights")
        return [path for path in found if path.name in wanted]
    if not found:
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        had = f"{pickled[0].name}, a pickle, which could run code" if pickled else "none"
        raise BadInputError(
            f"{directory} holds no weights (needed: *.safetensors; found: {had})",
            code="missing_weights",
            hint=ls(directory),
        )
    return found


def read_header(path: Path) -> Weights:
    """Read one safetensors header and check it against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _corrupt(path, f"it has {size} bytes, needed at least 8 for the header's length")
        (length,) = struct.unpack("<Q", head)
        if length > min(MAX_HEADER, size - 8):
            raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _corrupt(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not an object")
    return _sum_up(path, header, size - 8 - length)


def _sum_up(path: Path, header: dict[str, Any], data_size: int) -> Weights:
    parameters, by_dtype, last = 0, Counter[str](), 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        count, dtype, begin, end = _tensor(path, name, tensor)
        if end > data_size:
            raise _corrupt(
                path, f"tensor {name} ends at byte {end}, the data has {data_size} (cut short?)"
            )
        parameters += count
        by_dtype[dtype] += end - begin
        last = max(last, end)
    if not by_dtype:
        raise _corrupt(path, "it holds no tensors")
    if last != data_size:
        raise _corrupt(path, f"its tensors end at byte {last}, the data has {data_size}")
    return Weights(parameters, by_dtype)


def _tensor(path: Path, name: str, tensor: Any) -> tuple[int, str, int, int]:
    try:
        dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        count = math.prod(shape)
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane or not isinstance(dtype, str):
        raise _corrupt(path, f"tensor {name} is described wrongly")
    if dtype in BYTES and count * BYTES[dtype] != end - begin:
        raise _corrupt(
            path, f"tensor {name} needs {count * BYTES[dtype]} bytes and has {end - begin}"
        )
    return count, dtype, begin, end


def _index_files(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise _corrupt(index, "it has no weight_map")
    return list(weight_map.values())


def _architecture(config: dict[str, Any], directory: Path) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise _corrupt(directory / "config.json", 'it names no "architectures"')
    return names[0]


def _context(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in CONTEXT_KEYS:
            if isinstance(value := part.get(key), int):
                return value
    return 0


def _has_chat_template(directory: Path) -> bool:
    if any((directory / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model.

    Raises:
        BadInputError: it is missing, cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInputError(
            f"{path.parent} has no {path.name} (needed: a model directory as transformers saves "
            "it, with config.json and *.safetensors)",
            code="not_a_model",
            hint=ls(path.parent),
        ) from None
    except OSError as exc:
        raise BadInputError(
            f"cannot read {path}: {exc.strerror}", code="unreadable", hint=ls(path, "-l")
        ) from exc
    except (ValueError, RecursionError):
        raise _corrupt(path, "it is not JSON") from None
    if not isinstance(found, dict):
        raise _corrupt(path, "it is not a JSON object")
    return found


def _corrupt(path: Path, why: str, code: str = "corrupt_model") -> BadInputError:
    return BadInputError(
        f"{path} is corrupt: {why}", code=code, hint=ls(path.parent, "-l"), file=str(path)
    )
