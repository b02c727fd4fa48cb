"""``model rm``: models by name, or with ``--prune`` what nobody needs."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from rbee.errors import BadInputError, ConflictError, UsageError
from rbee.home import Home, find_home
from rbee.keeper.flags import RemoveFlags
from rbee.keeper.models import ago, find_among, find_infos, open_queen_for, read_disk
from rbee.keeper.output import human_bytes, note, print_data, print_json
from rbee.model import LOCALHOST
from rbee.models.catalog import Catalog, remove_items
from rbee.models.prune import choose_unneeded
from rbee.units import seconds, size
from rbee.wire import codec
from rbee.wire.messages import ModelInfo

UNUSED_FOR = 30 * 86400.0
Remove = Callable[[ModelInfo], Awaitable[None]]


async def remove_models(flags: RemoveFlags, names: Sequence[str]) -> None:
    """Remove the models named, or prune."""
    _check(flags, names)
    home = find_home(flags.home)
    if flags.prune:
        await _prune(flags, home)
    else:
        await _remove_named(flags, home, names)


def _check(flags: RemoveFlags, names: Sequence[str]) -> None:
    if bool(names) == flags.prune:
        raise UsageError(
            "model rm takes either one MODEL or more, or --prune",
            hint="rbee-keeper model rm smollm2-135m   # or: rbee-keeper model rm --prune",
        )


async def _remove_named(flags: RemoveFlags, home: Home, names: Sequence[str]) -> None:
    infos = await _infos(flags, home)
    found = {(i.node, i.name): i for name in names for i in find_among(infos, name, flags, home)}
    _refuse_used(list(found.values()))  # all or none
    async with _open_remover(flags, home) as remove:
        for info in found.values():
            if not flags.dry_run:
                await remove(info)
            word = "would remove" if flags.dry_run else "removed"
            note(f"{word} {info.model} ({human_bytes(info.size)})")
    if flags.json:
        print_json(codec.to_dict(list(found.values())))


def _refuse_used(infos: Sequence[ModelInfo]) -> None:
    for info in infos:
        if info.in_use:
            raise ConflictError(
                f"{info.model} is in use: a running worker has loaded it; nothing was removed",
                code="model_in_use",
                hint="rbee-keeper worker list   # then rbee-keeper worker stop WORKER",
            )


async def _prune(flags: RemoveFlags, home: Home) -> None:
    unused_for, max_size = _bounds(flags)
    infos = await _infos(flags, home)
    chosen = choose_unneeded(infos, time.time(), unused_for=unused_for, max_size=max_size)
    removed = []
    async with _open_remover(flags, home) as remove:
        for info in chosen:
            if flags.dry_run or await _removed(info, remove):
                removed.append(info)
                if not flags.json:
                    age = ago(info.last_used)
                    print_data(f"{info.model}  {human_bytes(info.size)}  last used {age}")
    _report(flags, infos, removed, max_size)


async def _removed(info: ModelInfo, remove: Remove) -> bool:
    try:
        await remove(info)
    except ConflictError as exc:  # somebody was quicker to use it
        note(f"kept: {exc}")
        return False
    return True


def _report(
    flags: RemoveFlags, infos: list[ModelInfo], removed: list[ModelInfo], max_size: int | None
) -> None:
    freed = sum(info.size for info in removed)
    left = sum(info.size for info in infos) - freed
    if flags.json:
        print_json(
            {
                "removed": codec.to_dict(removed),
                "freed": freed,
                "left": left,
                "dry_run": flags.dry_run,
            }
        )
    word = "would free" if flags.dry_run else "freed"
    note(f"{word} {human_bytes(freed)}; {human_bytes(left)} of models left")
    if max_size is not None and left > max_size:
        note(f"that is more than {human_bytes(max_size)}: what is left is in use")


def _bounds(flags: RemoveFlags) -> tuple[float | None, int | None]:
    try:
        unused_for = None if flags.unused_for is None else seconds(flags.unused_for)
        max_size = None if flags.max_size is None else size(flags.max_size)
    except BadInputError as exc:
        exc.hint = "rbee-keeper model rm --prune --unused-for 30d --max-size 50G --dry-run"
        raise
    if unused_for is not None and unused_for < 0:
        raise BadInputError(
            f"--unused-for must be 0 or more, got {flags.unused_for}",
            hint="rbee-keeper model rm --prune --unused-for 30d --dry-run",
        )
    if unused_for is None and max_size is None:
        unused_for = UNUSED_FOR
    return unused_for, max_size


# where ----------------------------------------------------------------------------------------
def _is_here(flags: RemoveFlags) -> bool:
    """Tell whether it is about our own disk, which needs no queen."""
    return not flags.queen_url and flags.node in (None, LOCALHOST)


async def _infos(flags: RemoveFlags, home: Home) -> list[ModelInfo]:
    if _is_here(flags):
        return await read_disk(home)
    infos = await find_infos(flags, home)
    node = flags.node or LOCALHOST  # what is removed is never every node's
    return [info for info in infos if info.node == node]


@asynccontextmanager
async def _open_remover(flags: RemoveFlags, home: Home) -> AsyncGenerator[Remove, None]:
    if _is_here(flags):

        async def remove_here(info: ModelInfo) -> None:
            item = Catalog(home.models).read(info.name)
            await trio.to_thread.run_sync(remove_items, home, [item])

        yield remove_here
        return
    async with open_queen_for(flags, home) as queen:
        assert queen is not None

        async def remove_there(info: ModelInfo) -> None:
            assert queen is not None
            await queen.client.remove_model(info.name, node=info.node)

        yield remove_there
