"""Dequantise a GGUF file once into a directory that vLLM can load.

Runs as a program of its own, ``python -m rbee.models.gguf SRC DST --dtype float32``, so that torch
and the weights live and die in a child. What is wrong is one JSON line on stdout and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rbee.errors import BadInputError, MachineError, RbeeError
from rbee.hints import install, ls
from rbee.models.child import error_line
from rbee.models.inspect import inspect_model
from rbee.models.preflight import ITEM_SIZES, OVERHEAD, check_disk, check_memory

# tokenizer files and the like, on top of the weights
SLACK = 64 * 2**20
# a text model needs none of these, and one that does not match torch breaks transformers' import
TORCH_EXTRAS = ("torchvision", "torchaudio", "torchcodec")


def dequantise(source: Path, target: Path, dtype: str) -> None:
    """Write ``source`` as safetensors with tokenizer, chat template and generation config.

    ``target`` appears whole or not at all.

    Raises:
        BadInputError: not a GGUF file, a part of one, an architecture that is not known.
        InsufficientError: not enough memory or disk, found out before anything is loaded.
        MachineError: a package is missing here.
    """
    _prepare_imports()
    reader = open_reader(source)
    check_architecture(source, _field(reader, "general.architecture"))
    if int(_field(reader, "split.count") or 1) > 1:
        raise BadInputError(
            f"{source.name} is one part of a split GGUF (needed: a single file)",
            code="split_gguf",
            hint=f"{_merge(source)}   # if it is the first part",
        )
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    _check_room(source, target, parameters, dtype)
    staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        _convert(source, staged, dtype, str(_field(reader, "tokenizer.chat_template") or ""))
        inspect_model(staged)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_architecture(source: Path, architecture: Any) -> None:
    """Refuse what transformers cannot map, before seconds are spent on loading it."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    known = sorted(set(GGUF_CONFIG_MAPPING) - {"general", "tokenizer"})
    plain = {name.replace("_", "") for name in known}
    name = str(architecture or "")
    if name.replace("_", "").replace("-", "") not in plain and "t5" not in name:
        raise BadInputError(
            f"{source.name} is a GGUF of architecture {name or 'unknown'!r}, which cannot be "
            f"dequantised (needed: one of {', '.join(known)})",
            code="unknown_architecture",
            hint="rbee-keeper model pull smollm2-135m",
            architecture=name,
        )


def _convert(source: Path, staged: Path, dtype: str, template: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype))
    _forget_quantisation(model)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)


def _forget_quantisation(model: Any) -> None:
    """The weights are plain now; transformers would refuse to save them as a quantised model."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _merge(part: Path) -> str:
    return shlex.join(["llama-gguf-split", "--merge", str(part), str(part.with_name("whole.gguf"))])


def _prepare_imports() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = "1"  # the output is a log
    for name in TORCH_EXTRAS:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        import accelerate  # noqa: F401 - transformers needs it to load GGUF
        import gguf
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as exc:
        raise MachineError(
            f"cannot dequantise: {exc} (needed: the packages torch, transformers, gguf, "
            "accelerate)",
            code="missing_package",
            hint=install("cpu"),
        ) from exc
    # transformers parses the file anew for config, tokenizer and weights, and makes the table of
    # tensor names once per submodule: together half of the time
    gguf.GGUFReader = cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)


def open_reader(source: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(str(source))
    except OSError as exc:
        raise BadInputError(
            f"cannot read {source}: {exc.strerror}", code="unreadable", hint=ls(source, "-l")
        ) from exc
    except Exception as exc:  # whatever a parser raises on bytes that are no GGUF
        raise BadInputError(
            f"{source} is corrupt or no GGUF file: {exc}",
            code="corrupt_model",
            hint=ls(source, "-l"),
            file=str(source),
        ) from exc


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _check_room(source: Path, target: Path, parameters: int, dtype: str) -> None:
    weights = parameters * ITEM_SIZES[dtype]
    check_disk(target.parent, weights + SLACK, what=f"{source.name} as {dtype}")
    # each tensor is float32 for a moment, and all of them are kept until the last one is read
    check_memory(2 * weights + OVERHEAD, what=f"dequantising {source.name} to {dtype}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rbee.models.gguf", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=sorted(ITEM_SIZES), default="float32")
    given = parser.parse_args(argv)
    try:
        dequantise(given.source.absolute(), given.target.absolute(), given.dtype)
    except RbeeError as exc:
        sys.stdout.write(error_line(exc))
        return 1
    except Exception as exc:
        traceback.print_exc()
        failed = RbeeError(
            f"cannot dequantise {given.source.name}: {type(exc).__name__}: {exc}",
            code="dequantise_failed",
            hint="rbee-keeper model pull smollm2-135m",
        )
        sys.stdout.write(error_line(failed))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
