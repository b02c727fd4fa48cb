"""The command line: commands, their flags, and nothing heavy until one runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import attrs
from cyclopts import App, CycloptsError, Parameter

from rbee import __version__
from rbee.errors import RbeeError, UsageError
from rbee.keeper import output
from rbee.keeper.flags import (
    AddNodeFlags,
    AnswerFlags,
    DataFlags,
    InferFlags,
    InstallFlags,
    ListenFlags,
    LogFlags,
    ModelFlags,
    NodeFlags,
    PullFlags,
    QueenFlags,
    ReapFlags,
    RemoveFlags,
    TailFlags,
    UpdateNodeFlags,
    WorkerStartFlags,
    WorkerStopFlags,
)
from rbee.keeper.sources import ConfigFile
from rbee.sources import Environment

# What a positional means is said on the spot, never inherited: `model rm` would follow RBEE_MODEL.
Positional = Parameter(show_env_var=False)
Shell = Literal["bash", "zsh", "fish"]
ModelName = Annotated[
    str,
    Positional,
    Parameter(help="A directory, a GGUF file, an alias, hf:org/repo or pypi:package."),
]
WorkerName = Annotated[str, Positional, Parameter(help="The worker's id.")]
NodeName = Annotated[str, Positional, Parameter(help="The node's name.")]

app = App(
    name="rbee-keeper",
    help="Run models on your machines, and leave nothing behind.",
    version=f"rbee-keeper {__version__}",
    default_parameter=Parameter(negative_iterable=()),
    exit_on_error=False,
    print_error=False,
    result_action="return_value",
)
queen = App(name="queen", help="Start, stop and show the queen that outlives commands.")
node = App(name="node", help="Add, check, show and change the machines of the cluster.")
hive = App(name="hive", help="Start, stop and show the hives of the running queen.")
worker = App(name="worker", help="Start, stop and show workers.")
model = App(name="model", help="Fetch, show and remove models.")
for group in (queen, node, hive, worker, model):
    app.command(group)


@app.command
def infer(*, flags: InferFlags) -> int:
    """Have a model answer one prompt, streaming to stdout."""
    from rbee.keeper.task import infer_task

    task = infer_task(flags)
    from rbee.keeper import infer as command
    from rbee.keeper.root import run_command

    return run_command(partial(command.infer, flags, task), timeout=flags.timeout)


@app.command
def run(model: ModelName, /, *, flags: AnswerFlags | None = None) -> int:
    """Talk with a model; /exit or Ctrl+D ends."""
    from rbee.keeper.task import chat_task

    flags = flags or AnswerFlags()
    chat_task(flags, model, [])  # refuse what cannot work before anything is started
    from rbee.keeper import chat
    from rbee.keeper.root import run_command

    return run_command(partial(chat.chat, flags, model))


@queen.command(name="start")
def queen_start(*, flags: ListenFlags | None = None) -> int:
    """Start a queen in the background and print its URL."""
    from rbee.keeper import operator
    from rbee.keeper.root import run_command

    return run_command(partial(operator.print_start, flags or ListenFlags()))


@queen.command(name="stop")
def queen_stop(*, flags: DataFlags | None = None) -> int:
    """Stop the queen and all below it; print the seconds until it was clean."""
    from rbee.keeper import operator
    from rbee.keeper.root import run_command

    return run_command(partial(operator.print_stop, flags or DataFlags()))


@queen.command(name="status")
def queen_status(*, flags: QueenFlags | None = None) -> int:
    """Show the queen."""
    return _list("show_queen", flags)


@node.command(name="add")
def node_add(name: NodeName, /, *, flags: AddNodeFlags | None = None) -> int:
    """Try a machine over SSH and register it under a name."""
    from rbee.keeper import node_add as command
    from rbee.keeper.root import run_command

    flags = flags or AddNodeFlags()
    body = command.body_of(flags, name)
    return run_command(partial(command.add_node, flags, body))


@node.command(name="check")
def node_check(name: NodeName, /, *, flags: DataFlags | None = None) -> int:
    """Try all that a node needs, step by step: the way there, rbee, engine, disk, ports."""
    from rbee.keeper.node_check import check_node
    from rbee.keeper.root import run_command

    return run_command(partial(check_node, flags or DataFlags(), name))


@node.command(name="list")
def node_list(*, flags: DataFlags | None = None) -> int:
    """Show the machines that are registered, and this one."""
    from rbee.keeper import nodes
    from rbee.keeper.root import run_command

    return run_command(partial(nodes.list_nodes, flags or DataFlags()))


@node.command(name="show")
def node_show(name: NodeName, /, *, flags: DataFlags | None = None) -> int:
    """Show how a node is reached, when it was last seen, and what it has."""
    from rbee.keeper import nodes
    from rbee.keeper.root import run_command

    return run_command(partial(nodes.show_node, flags or DataFlags(), name))


@node.command(name="update")
def node_update(name: NodeName, /, *, flags: UpdateNodeFlags | None = None) -> int:
    """Change what is given of a node's entry; an empty string brings back the default."""
    from rbee.keeper import nodes
    from rbee.keeper.root import run_command

    flags = flags or UpdateNodeFlags()
    update = nodes.node_update(flags, name)
    return run_command(partial(nodes.update_node, flags, name, update))


@node.command(name="remove")
def node_remove(name: NodeName, /, *, flags: DataFlags | None = None) -> int:
    """Forget a node; nothing on it is touched."""
    from rbee.keeper import nodes
    from rbee.keeper.root import run_command

    return run_command(partial(nodes.remove_node, flags or DataFlags(), name))


@node.command(name="install")
def node_install(name: NodeName, /, *, flags: InstallFlags | None = None) -> int:
    """Put this rbee onto a node; what is there stays in use until the new one runs."""
    from rbee.keeper.install import install_node
    from rbee.keeper.root import run_command

    return run_command(partial(install_node, flags or InstallFlags(), name))


@hive.command(name="start")
def hive_start(*, flags: NodeFlags | None = None) -> int:
    """Have a hive run on a node; print its URL."""
    return _hive("start_hive", flags)


@hive.command(name="stop")
def hive_stop(*, flags: NodeFlags | None = None) -> int:
    """Stop a node's hive and its workers; print the seconds until it was clean."""
    return _hive("stop_hive", flags)


@hive.command(name="status")
def hive_status(*, flags: NodeFlags | None = None) -> int:
    """Show a node's hive: when it was last heard, its workers, memory and disk."""
    return _hive("show_hive", flags)


@hive.command(name="list")
def hive_list(*, flags: NodeFlags | None = None) -> int:
    """Show the hives of all nodes."""
    return _hive("list_hives", flags)


def _hive(name: str, flags: NodeFlags | None) -> int:
    from rbee.keeper import hives
    from rbee.keeper.root import run_command

    return run_command(partial(getattr(hives, name), flags or NodeFlags()))


@worker.command(name="start")
def worker_start(model: ModelName, /, *, flags: WorkerStartFlags | None = None) -> int:
    """Start a worker, one more each time; print its id when it is ready."""
    from rbee.keeper import workers
    from rbee.keeper.root import run_command

    flags = flags or WorkerStartFlags()
    request = workers.start_request(flags, model)
    return run_command(partial(workers.start_worker, flags, request))


@worker.command(name="stop")
def worker_stop(*ids: WorkerName, flags: WorkerStopFlags | None = None) -> int:
    """Stop workers; print the seconds until nothing of each was left."""
    from rbee.keeper import workers
    from rbee.keeper.root import run_command

    flags = flags or WorkerStopFlags()
    workers.check_choice(flags, ids)
    return run_command(partial(workers.stop_workers, flags, ids))


@worker.command(name="logs")
def worker_logs(name: WorkerName, /, *, flags: TailFlags | None = None) -> int:
    """Show what a worker has logged, also after its end."""
    from rbee.keeper.logs import show_logs
    from rbee.keeper.root import run_command

    flags = flags or TailFlags()
    return run_command(partial(show_logs, of_worker(flags, name)))


def of_worker(flags: TailFlags, worker: str) -> LogFlags:
    """Return the flags of ``logs --worker`` that mean the same."""
    return LogFlags(**attrs.asdict(flags), worker=worker)


@worker.command(name="list")
def worker_list(*, flags: QueenFlags | None = None) -> int:
    """Show the workers of all nodes."""
    return _list("list_workers", flags)


@app.command
def ps(*, flags: QueenFlags | None = None) -> int:
    """Show queen, hives and workers."""
    return _list("list_processes", flags)


@app.command
def status(*, flags: QueenFlags | None = None) -> int:
    """Show how things stand."""
    return _list("show_status", flags)


def _list(name: str, flags: QueenFlags | None) -> int:
    from rbee.keeper import listing
    from rbee.keeper.root import run_command

    return run_command(partial(getattr(listing, name), flags or QueenFlags()))


@app.command
def logs(*, flags: LogFlags | None = None) -> int:
    """Show what queen, hive and workers have logged."""
    from rbee.keeper.logs import show_logs
    from rbee.keeper.root import run_command

    return run_command(partial(show_logs, flags or LogFlags()))


@app.command
def reap(*, flags: ReapFlags | None = None) -> int:
    """End what rbee has left on a machine, by its journal, and nothing that it did not start."""
    from rbee.keeper.reap import reap_leftovers
    from rbee.keeper.root import run_command

    return run_command(partial(reap_leftovers, flags or ReapFlags()))


@model.command(name="list")
def model_list(*, flags: ModelFlags | None = None) -> int:
    """Show the models on disk: of this machine or, if a queen runs, of all nodes."""
    from rbee.keeper.models import print_models
    from rbee.keeper.root import run_command

    return run_command(partial(print_models, flags or ModelFlags()))


@model.command(name="aliases")
def model_aliases(*, flags: DataFlags | None = None) -> int:
    """Show the short names of models, what they lead to and where each comes from."""
    from rbee.keeper.aliases import print_aliases

    print_aliases(flags or DataFlags())
    return 0


@model.command(name="pull")
def model_pull(model: ModelName, /, *, flags: PullFlags | None = None) -> int:
    """Fetch a model, so that its first worker need not, or repair it."""
    from rbee.keeper.pull import pull_model
    from rbee.keeper.root import run_command

    return run_command(partial(pull_model, flags or PullFlags(), model))


@model.command(name="show")
def model_show(model: ModelName, /, *, flags: ModelFlags | None = None) -> int:
    """Show where a model came from, its size, its files, and what is wrong with it."""
    from rbee.keeper.models import print_model
    from rbee.keeper.root import run_command

    return run_command(partial(print_model, flags or ModelFlags(), model))


@model.command(name="rm")
def model_rm(*models: ModelName, flags: RemoveFlags | None = None) -> int:
    """Remove models from the disk, unless a worker uses them; with --prune, what is not needed."""
    from rbee.keeper.removal import remove_models
    from rbee.keeper.root import run_command

    return run_command(partial(remove_models, flags or RemoveFlags(), models))


@app.command(name="completion")
def completion(shell: Annotated[Shell, Positional], /) -> int:
    """Print the completion script for a shell."""
    output.print_data(app.generate_completion(shell=shell))
    return 0


@app.command(name="--install-completion")
def install_completion(*, shell: Shell | None = None) -> int:
    """Install completion for the shell in use."""
    output.print_data(f"installed {app.install_completion(shell=shell)}")
    output.note("start a new shell to use it")
    return 0


def leaf_commands(group: App, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], App]:
    """Return the commands that do something, by the words that name them."""
    found: dict[tuple[str, ...], App] = {}
    for name in group:
        if not name.startswith("-"):
            below = leaf_commands(group[name], (*path, name))
            found |= below or {(*path, name): group[name]}
    return found


def command_names() -> set[str]:
    """Return the first words of all commands."""
    return {path[0] for path in leaf_commands(app)}


app.config = (Environment(), ConfigFile(command_names))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run_line(sys.argv[1:] if arguments is None else arguments))


def run_line(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    output.ensure_standard_fds()
    try:
        code = app(list(arguments))
    except CycloptsError as exc:
        return _report(_usage_error(exc, arguments))
    except RbeeError as exc:
        return _report(exc)
    except SystemExit:  # rich's, when the reader of the help has had enough
        return 0
    except KeyboardInterrupt:  # before trio has taken over the signals
        return 130
    return code if isinstance(code, int) else 0


def _report(error: RbeeError) -> int:
    if not isinstance(error, output.StdoutClosedError):
        output.print_error(error)
    return error.exit_code


def _usage_error(exc: CycloptsError, arguments: Sequence[str]) -> UsageError:
    exc.verbose = False
    message, _, suggestion = " ".join(str(exc).split()).partition(" Did you mean ")
    hint = " ".join(["rbee-keeper", *(exc.command_chain or ()), "--help"])
    if suggestion:
        hint = f"did you mean {suggestion.partition('?')[0]}?   # or: {hint}"
    return UsageError(message, hint=hint)
