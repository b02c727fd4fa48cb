"""Owners of an operator's hive: queens whose workers run here for as long as they say so."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from rbee.wire.messages import OwnerLease

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class Owner:
    id: str
    lease: OwnerLease
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


class Owners:
    """Leases by queen id; a lease that ends calls ``on_end`` with the id."""

    def __init__(self, on_end: Callable[[str], Awaitable[None]]) -> None:
        self._on_end = on_end
        self._owners: dict[str, Owner] = {}
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                nursery.cancel_scope.cancel(reason="hive stops")

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(list(self._owners.values()))

    def get(self, owner_id: str) -> Owner | None:
        return self._owners.get(owner_id)

    def renew(self, owner_id: str, lease: OwnerLease) -> None:
        """Begin or renew a lease; it ends ``lease.lease`` seconds from now."""
        assert self._nursery is not None
        owner = self._owners.get(owner_id)
        if owner is None:
            owner = self._owners[owner_id] = Owner(owner_id, lease)
            self._nursery.start_soon(self._keep, owner)
            log.info("queen %s uses this hive", owner_id)
        owner.lease = lease
        owner.scope.deadline = trio.current_time() + lease.lease

    def end(self, owner_id: str) -> None:
        """End a lease now; unknown ids are fine."""
        if owner := self._owners.get(owner_id):
            owner.scope.cancel(reason="the owner said goodbye")

    async def _keep(self, owner: Owner) -> None:
        with owner.scope:
            await trio.sleep_forever()
        del self._owners[owner.id]
        log.info("queen %s is gone, stopping its workers", owner.id)
        await self._on_end(owner.id)
