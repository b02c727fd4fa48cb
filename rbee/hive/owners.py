"""Owners of an operator's hive: queens whose workers run here for as long as they say so."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import attrs
import trio

from rbee.errors import BadInputError
from rbee.scopes import TaskOwner
from rbee.wire.messages import OwnerLease

log = logging.getLogger(__name__)

STEP = 0.125
LONGEST = 3600.0  # seconds that a lease may have


@attrs.define(eq=False)
class Owner:
    id: str
    lease: OwnerLease
    left: float = 0.0  # seconds of the lease
    goodbye: trio.Event = attrs.field(factory=trio.Event)


class Owners(TaskOwner):
    """Leases by queen id; a lease that ends calls ``on_end`` with the id."""

    def __init__(self, on_end: Callable[[str], Awaitable[None]]) -> None:
        self._on_end = on_end
        self._owners: dict[str, Owner] = {}

    def get(self, owner_id: str) -> Owner | None:
        return self._owners.get(owner_id)

    def renew(self, owner_id: str, lease: OwnerLease) -> None:
        """Begin or renew a lease; it ends ``lease.lease`` seconds from now.

        Raises:
            BadInputError: the lease is not a sensible time.
        """
        if not 0 < lease.lease <= LONGEST:
            raise BadInputError(f"a lease takes up to {LONGEST:g} seconds: {lease.lease:g}")
        owner = self._owners.get(owner_id)
        if owner is None:
            owner = self._owners[owner_id] = Owner(owner_id, lease)
            self.tasks.start_soon(self._keep, owner)
            log.info("queen %s uses this hive", owner_id)
        owner.lease = lease
        owner.left = lease.lease

    def end(self, owner_id: str) -> None:
        """End a lease now; unknown ids are fine."""
        if owner := self._owners.get(owner_id):
            owner.goodbye.set()

    async def _keep(self, owner: Owner) -> None:
        # Counted in steps: while this hive is frozen no lease runs out, nobody could renew it.
        while owner.left > 0 and not owner.goodbye.is_set():
            with trio.move_on_after(STEP):
                await owner.goodbye.wait()
            owner.left -= STEP
        del self._owners[owner.id]
        log.info("queen %s is gone, stopping its workers", owner.id)
        await self._on_end(owner.id)
