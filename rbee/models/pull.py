"""A model asked for before anybody uses it: fetched, or what is damaged of it put right."""

from __future__ import annotations

from functools import partial

import trio

from rbee.errors import NotFoundError
from rbee.home import Home
from rbee.models.catalog import show_model
from rbee.models.child import Narrate, Runner
from rbee.models.info import damage_of
from rbee.models.provision import LocalModel, provision
from rbee.models.reference import Aliases, Meaning
from rbee.wire.messages import HubAccess


async def pull(
    name: str,
    home: Home,
    *,
    aliases: Aliases,
    meaning: Meaning | None = None,
    access: HubAccess | None = None,
    dtype: str | None,
    default: str,
    run: Runner,
    narrate: Narrate,
) -> LocalModel:
    """Have a model on this disk, whole. Cancelling leaves nothing half-written.

    Args:
        meaning, access: as of `provision`.
        dtype: what a GGUF is dequantised to; None means ``default``, and every other dtype that
            it was dequantised to before and that is damaged now.

    Raises:
        ConflictError: what is to be put right is in use by a worker.
        RbeeError: as `provision` does.
    """
    provide = partial(
        provision, name, home, aliases=aliases, meaning=meaning, access=access, run=run,
        narrate=narrate,
    )  # fmt: skip
    model = await provide(dtype=dtype or default)
    if dtype is None:
        known = {**aliases, name: meaning.sources} if meaning and meaning.sources else aliases
        for other in await trio.to_thread.run_sync(_damaged_dtypes, name, home, known):
            await provide(dtype=other)
    return model


def _damaged_dtypes(name: str, home: Home, aliases: Aliases) -> list[str]:
    """Return the dtypes of the dequantised copies that cannot be used."""
    try:
        items = show_model(home, name, aliases=aliases)
    except NotFoundError:  # a path outside of the catalog
        return []
    made = [(item.entry, item) for item in items if item.entry and item.entry.origins]
    return sorted({entry.dtype for entry, item in made if damage_of(item)})
