"""The flags of the commands, grouped; each is also ``RBEE_<FLAG>`` and a key of config.toml."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any, Literal

import attrs
from cyclopts import Parameter

from rbee.errors import UsageError
from rbee.hints import infer


def _one_or_json(_: Any, value: str) -> list[str]:
    """Take ``RBEE_STOP`` as one string, blanks included, or as a JSON list of several."""
    if value.startswith("["):
        try:
            return [str(item) for item in jsonlib.loads(value)]
        except ValueError as exc:
            raise UsageError(
                f"{value[:40]!r} begins like a JSON list and is none: {exc}",
                hint=f"""RBEE_STOP='["one", "two"]' {infer()}""",
            ) from exc
    return [value]


Json = Annotated[bool, Parameter(help="Print data as JSON on stdout.", negative=())]


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class HomeFlags:
    """Flags of every command."""

    home: Annotated[
        str | None, Parameter(help="Where rbee keeps its things (default: ~/.rbee).")
    ] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class DataFlags(HomeFlags):
    """Flags of the commands that print data."""

    json: Json = False


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class QueenFlags(DataFlags):
    """Flags of the commands that talk to a queen."""

    queen_url: Annotated[
        str | None, Parameter(help="Use this queen instead of the one of the home.")
    ] = None
    token_file: Annotated[
        str | None,
        Parameter(
            help="The token for --queen-url (default: the home's, sent on this machine only)."
        ),
    ] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class StartFlags(QueenFlags):
    """Flags of the commands that may start a worker: where it runs, and how."""

    node: Annotated[str | None, Parameter(help="The node to run on.")] = None
    backend: Annotated[Literal["cpu", "cuda"] | None, Parameter(help="What to run on.")] = None
    device: Annotated[str | None, Parameter(help="0, or 0,1 for tensor parallel.")] = None
    engine: Annotated[str | None, Parameter(help="The engine (default: vllm).")] = None
    max_model_len: Annotated[int | None, Parameter(help="The context, in tokens.")] = None
    dtype: Annotated[str | None, Parameter(help="Of the weights: float32, bfloat16, …")] = None
    kv_cache: Annotated[
        str | None, Parameter(help="The size of the KV cache: bytes, or 512M, 4G, …")
    ] = None
    max_num_seqs: Annotated[int | None, Parameter(help="Requests it works on at once.")] = None
    engine_arg: Annotated[
        tuple[str, ...],
        Parameter(
            help="Any other option of the engine, as key=value (repeatable).",
            negative_iterable=(),
            env_var_split=_one_or_json,
        ),
    ] = ()
    keep_alive: Annotated[
        str | None,
        Parameter(
            help="How long the worker stays without work: seconds, 10m, 2h; -1 is for ever.",
            allow_leading_hyphen=True,
        ),
    ] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class WorkerStartFlags(StartFlags):
    """Flags of ``worker start``."""

    wait: Annotated[bool, Parameter(help="Wait until it is ready; Ctrl+C leaves it loading.")] = (
        True
    )
    explain: Annotated[
        bool,
        Parameter(
            help="Only tell where it would be started, and why.", negative=(), show_env_var=False
        ),
    ] = False


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class WorkerStopFlags(QueenFlags):
    """Flags of ``worker stop``. What to stop is said on the spot, never inherited."""

    model: Annotated[
        str | None, Parameter(help="Stop the workers of this model.", show_env_var=False)
    ] = None
    all: Annotated[bool, Parameter(help="Stop all workers.", negative=(), show_env_var=False)] = (
        False
    )


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class NodeFlags(QueenFlags):
    """Flags of the commands about one node's hive."""

    node: Annotated[str | None, Parameter(help="The node (default: localhost).")] = None


# How a node is reached is said on the spot, never inherited: RBEE_HOST is where a queen listens.
_Said = Parameter(show_env_var=False)


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class NodeEntryFlags(DataFlags):
    """Flags about a node's entry; an empty string stands for the default."""

    host: Annotated[
        str | None, _Said, Parameter(help="Host name or address (default: the node's name).")
    ] = None
    port: Annotated[str | None, _Said, Parameter(help="The SSH port (default: 22).")] = None
    user: Annotated[str | None, _Said, Parameter(help="The user to log in as.")] = None
    key: Annotated[
        str | None, _Said, Parameter(help="A private key (default: the agent's and ~/.ssh's).")
    ] = None
    from_ssh_config: Annotated[
        str | None,
        _Said,
        Parameter(help="A host of ~/.ssh/config instead of host, port, user and key."),
    ] = None
    transport: Annotated[
        Literal["direct", "ssh", ""] | None,
        _Said,
        Parameter(help="direct, or ssh: all of it through the SSH connection."),
    ] = None
    rbee_path: Annotated[
        str | None, _Said, Parameter(help="Where rbee-hive is there (default: ~/.rbee/venv/bin).")
    ] = None
    env: Annotated[
        tuple[str, ...],
        _Said,
        Parameter(
            help="Set there for the hive, NAME=VALUE (repeatable); NAME= removes it.",
            negative_iterable=(),
        ),
    ] = ()


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class InstallFlags(DataFlags):
    """Flags of ``node install``."""

    extra: Annotated[
        Literal["cpu", "cuda", "none"] | None,
        _Said,
        Parameter(help="What rbee runs on (default: cuda if there is an NVIDIA GPU, else cpu)."),
    ] = None
    wheelhouse: Annotated[
        str | None,
        _Said,
        Parameter(help="A directory of wheels here, for nodes without a package index."),
    ] = None
    python: Annotated[
        str | None, _Said, Parameter(help="The node's Python to use, 3.11 or newer.")
    ] = None
    force: Annotated[
        bool, _Said, Parameter(help="Install although the same is there.", negative=())
    ] = False


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class UpdateNodeFlags(NodeEntryFlags):
    """Flags of ``node update``."""


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class AddNodeFlags(NodeEntryFlags):
    """Flags of ``node add``."""

    accept_new_host_key: Annotated[
        bool,
        _Said,
        Parameter(
            help="Take an unknown host key without asking; a changed one never.", negative=()
        ),
    ] = False


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class AnswerFlags(StartFlags):
    """Flags of the commands that have a model answer."""

    max_tokens: Annotated[int | None, Parameter(help="End after so many tokens.")] = None
    temperature: Annotated[float | None, Parameter(help="0 always takes the likeliest.")] = None
    top_p: Annotated[float | None, Parameter(help="Nucleus sampling, above 0 up to 1.")] = None
    top_k: Annotated[int | None, Parameter(help="Take from the k likeliest; 0 is all.")] = None
    min_p: Annotated[float | None, Parameter(help="Least probability, from 0 to 1.")] = None
    repetition_penalty: Annotated[float | None, Parameter(help="Above 0; 1 is none.")] = None
    seed: Annotated[int | None, Parameter(help="Makes sampling repeatable.")] = None
    stop: Annotated[
        tuple[str, ...],
        Parameter(
            help="End before this text (repeatable; RBEE_STOP may be a JSON list).",
            negative_iterable=(),
            allow_leading_hyphen=True,
            env_var_split=_one_or_json,
        ),
    ] = ()
    system: Annotated[
        str | None, Parameter(help="The system message.", allow_leading_hyphen=True)
    ] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class InferFlags(AnswerFlags):
    """Flags of ``infer``."""

    model: Annotated[
        str, Parameter(help="A directory, a GGUF file, an alias, hf:org/repo or pypi:package.")
    ]
    prompt: Annotated[
        str, Parameter(help='The prompt; "-" reads it from stdin.', allow_leading_hyphen=True)
    ]
    raw: Annotated[
        bool, Parameter(help="Send the prompt without the chat template.", negative=())
    ] = False
    timeout: Annotated[float | None, Parameter(help="Give up after so many seconds.")] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class ListenFlags(DataFlags):
    """Flags of ``queen start``."""

    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="The port to listen on; 0 is any free one.")] = 8080


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class TailFlags(DataFlags):
    """Flags of ``worker logs``."""

    lines: Annotated[int, Parameter(help="Begin with so many last lines of each.")] = 50
    follow: Annotated[bool, Parameter(help="Go on with what comes.", negative=())] = False
    node: Annotated[str | None, Parameter(help="The logs of this node.")] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class LogFlags(TailFlags):
    """Flags of ``logs``."""

    worker: Annotated[str | None, Parameter(help="The log of this worker.")] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class ReapFlags(DataFlags):
    """Flags of ``reap``."""

    node: Annotated[str | None, Parameter(help="The node (default: this machine).")] = None
    dry_run: Annotated[bool, Parameter(help="Only tell what would be ended.", negative=())] = False


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class ModelFlags(QueenFlags):
    """Flags of the commands that are about models on a disk."""

    node: Annotated[str | None, Parameter(help="The models of this node.")] = None


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class PullFlags(ModelFlags):
    """Flags of ``model pull``."""

    dtype: Annotated[
        str | None, Parameter(help="What a GGUF is dequantised to: float32, bfloat16, …")
    ] = None
    copy: Annotated[
        bool,
        Parameter(
            help="Send it to --node from this machine, over SSH: no hub is asked.",
            negative=(),
            show_env_var=False,
        ),
    ] = False


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class RemoveFlags(ModelFlags):
    """Flags of ``model rm``."""

    prune: Annotated[
        bool,
        Parameter(
            help="Remove what nobody uses, least recently used first.",
            negative=(),
            show_env_var=False,
        ),
    ] = False
    unused_for: Annotated[
        str | None,
        Parameter(help="Prune what was not used for 12h, 30d, … (30d if there is no --max-size)."),
    ] = None
    max_size: Annotated[
        str | None, Parameter(help="Prune until all models have at most 500M, 50G, …")
    ] = None
    dry_run: Annotated[bool, Parameter(help="Only tell what would be removed.", negative=())] = (
        False
    )


def every_flag() -> set[str]:
    """Return the names, without dashes, of all flags of all commands."""
    kinds = (InferFlags, ListenFlags, LogFlags, PullFlags, RemoveFlags, WorkerStartFlags)
    fields = [field for kind in kinds for field in attrs.fields(kind)]
    only_said = {"copy", "explain", "prune"}
    return {field.name.replace("_", "-") for field in fields} - only_said
