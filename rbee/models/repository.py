"""What a hub's repository holds, and which of its files make a model that vLLM can load.

No network and no huggingface_hub here: the daemons read what the child that does talk wrote down.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import attrs

from rbee.errors import BadInputError
from rbee.hints import pull
from rbee.home import write_atomic
from rbee.models.catalog import File
from rbee.models.pypi import MODEL_FILES
from rbee.wire import codec

MANIFEST = "manifest.json"
_INDEX = "model.safetensors.index.json"
# a name that is safe on any disk; one level down only the modules of an embedding model
_PLAIN = re.compile(r"(\d+_\w{1,40}/)?\w[\w.+-]{0,150}")
_PART = re.compile(r"[0-9a-f]{16}-.+")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# what unpickles or runs, whatever it is called
_CODE = (".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".so", ".sh")
# JSON that belongs to other formats or to training
_OTHERS = re.compile(r"(pytorch_model|tf_model|flax_model).*|(trainer|optimizer)_state\.json")
_FORMATS = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".safetensors")


@attrs.frozen
class Remote:
    """One file of a repository.

    Attributes:
        size: bytes; None where the hub does not tell.
        sha256: of files in large file storage, else "".
        git_sha1: git's name of the bytes of other files, else "".
        commit: what the file is of; tells bytes apart where the hub gives no hash.
    """

    name: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    commit: str = ""

    @property
    def part(self) -> str:
        """Name the file for as long as not all of them are here: other bytes, other name."""
        unknown = hashlib.sha256(self.commit.encode()).hexdigest()
        mark = self.sha256 or self.git_sha1 or unknown
        return f"{mark[:16]}-{self.name.replace('/', '--')}"


@attrs.frozen
class Fetched:
    """What lies complete and checked in a directory: each file under its ``part`` name."""

    commit: str
    files: tuple[File, ...]
    parts: tuple[str, ...]

    def save(self, directory: Path) -> None:
        write_atomic(directory / MANIFEST, codec.dumps(self).decode())

    @classmethod
    def load(cls, directory: Path) -> Fetched:
        return codec.loads((directory / MANIFEST).read_bytes(), cls)


def is_part(name: str) -> bool:
    """Tell whether a file of that name can be one of ours, as `Remote.part` names them."""
    return _PART.fullmatch(name) is not None


def choose(repo: str, files: Iterable[Remote]) -> list[Remote]:
    """Pick safetensors, config, tokenizer and chat template; small files first.

    Raises:
        BadInputError: no safetensors, or no config.json; the message says what there is.
    """
    there = [file for file in files if _PLAIN.fullmatch(file.name)]
    names = {file.name for file in there}
    weights = _weights(names)
    if not weights:
        raise _no_safetensors(repo, names)
    if "config.json" not in names:
        raise BadInputError(
            f"hf:{repo} has no config.json, so no engine can load it (needed: a repository as "
            "transformers saves a model)",
            code="not_a_model",
            hint="rbee-keeper model list",
        )
    chosen = [file for file in there if file.name in weights or belongs(file.name)]
    return sorted(chosen, key=lambda file: (file.name in weights, file.name))


def _weights(names: set[str]) -> set[str]:
    """Return one set of weights: the shards, or the whole file, not the same bytes twice."""
    deeper = {name for name in names if name.endswith(".safetensors") and "/" in name}
    found = {name for name in names if name.endswith(".safetensors")} - deeper
    shards = {name for name in found if _SHARD.fullmatch(name)}
    if shards and _INDEX in names:
        return shards | deeper
    if "model.safetensors" in found:
        return {"model.safetensors"} | deeper
    plain = {name for name in found if not name.startswith("consolidated")}
    return (plain or found) and (plain or found) | deeper


def belongs(name: str) -> bool:
    """Tell whether a file beside the weights is part of the model: no code, no other format."""
    last = PurePosixPath(name).name
    if last.endswith(_CODE) or last.endswith(".safetensors") or _OTHERS.fullmatch(last):
        return False
    return last.endswith(MODEL_FILES) or (last.startswith("tokenizer") and "/" not in name)


def _no_safetensors(repo: str, names: set[str]) -> BadInputError:
    formats = sorted({f"*{end}" for end in _FORMATS for name in names if name.endswith(end)})
    had = f"weights as {', '.join(formats)}" if formats else "no weights at all"
    hint = "rbee-keeper model list"
    if "*.gguf" in formats:
        hint = _one_gguf(repo, min(name for name in names if name.endswith(".gguf")))
    return BadInputError(
        f"hf:{repo} holds no *.safetensors (needed: those, with config.json; found: {had})",
        code="no_safetensors",
        hint=hint,
        formats=formats,
    )


def _one_gguf(repo: str, name: str) -> str:
    fetch = shlex.join(["hf", "download", repo, name, "--local-dir", "."])
    return f"{fetch} && {pull(f'./{name}')}   # this one or another"
