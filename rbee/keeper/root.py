"""The root of a command: signals, deadline, errors, and the exit code they come to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from rbee.errors import DeadlineError, PeerError, RbeeError, leaves
from rbee.hints import infer
from rbee.keeper.output import StdoutClosedError, ToldError, print_error
from rbee.scopes import StopReason, cancel_on_signal, open_service


def run_command(command: Callable[[], Awaitable[None]], *, timeout: float | None = None) -> int:
    """Run an async command to its end, print its error if there is one, return the exit code.

    A stop signal cancels it; when everything is cleaned up the code is 128 + the signal's number.
    """
    reason = StopReason()
    try:
        stopped = trio.run(_run, command, reason, timeout)
    except BaseException as exc:
        if reason.signal:  # whatever broke while it was being stopped is not news
            return 128 + reason.signal
        error = first_error(exc)
        if error is None:
            raise
        return report(error)
    return 128 + reason.signal if stopped else 0


async def _run(
    command: Callable[[], Awaitable[None]], reason: StopReason, timeout: float | None
) -> bool:
    root = trio.CancelScope()
    # The watcher outlives the cleanup: a second Ctrl+C must not meet the default handler.
    async with open_service(cancel_on_signal, root, reason):
        with root:
            await _run_within(command, timeout)
    return root.cancelled_caught


async def _run_within(command: Callable[[], Awaitable[None]], timeout: float | None) -> None:
    with trio.move_on_after(timeout if timeout is not None else float("inf")) as scope:
        await command()
    if scope.cancelled_caught:
        raise DeadlineError(
            f"not done within {timeout:g} s; the job was cancelled",
            hint=infer("--timeout", 600),
        )


def first_error(exc: BaseException) -> RbeeError | None:
    """Return the error to tell: of several, what broke rather than the connection it broke."""
    errors = [leaf for leaf in leaves(exc) if isinstance(leaf, RbeeError)]
    if len(errors) != sum(1 for _ in leaves(exc)):
        return None  # a bug among them: show all of it
    return min(errors, key=lambda error: type(error) is PeerError, default=None)


def report(error: RbeeError) -> int:
    """Print an error and return its exit code."""
    if not isinstance(error, StdoutClosedError | ToldError):
        print_error(error)
    return error.exit_code
