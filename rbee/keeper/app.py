"""The command line: commands, their flags, and nothing heavy until one runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from rbee import __version__
from rbee.errors import RbeeError, UsageError
from rbee.keeper import output
from rbee.keeper.flags import (
    AnswerFlags,
    DataFlags,
    InferFlags,
    ListenFlags,
    LogFlags,
    ModelFlags,
    PullFlags,
    QueenFlags,
    RemoveFlags,
)
from rbee.keeper.sources import ConfigFile
from rbee.sources import Environment

# What a positional means is said on the spot, never inherited: `model rm` would follow RBEE_MODEL.
Positional = Parameter(show_env_var=False)
Shell = Literal["bash", "zsh", "fish"]
ModelName = Annotated[str, Positional, Parameter(help="A directory, an alias or pypi:package.")]

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
worker = App(name="worker", help="Show workers.")
model = App(name="model", help="Fetch, show and remove models.")
for group in (queen, worker, model):
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


@model.command(name="list")
def model_list(*, flags: ModelFlags | None = None) -> int:
    """Show the models on disk: of this machine or, if a queen runs, of all nodes."""
    from rbee.keeper.models import print_models
    from rbee.keeper.root import run_command

    return run_command(partial(print_models, flags or ModelFlags()))


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
