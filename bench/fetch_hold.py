"""Holds D's first fetch back until P has computed everything: what a handoff without overlap would be.

Around D's importers, where faults are injected too: D reserves, connects and hears of every chunk as ever,
but gets its way to P's memory, and so grants and fetches, only when it has read that P is FILLED.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import Incarnation, WorkerId
from pdserve.kvtransfer.handoff.decode_site import Importers
from pdserve.kvtransfer.transports.base import Importer, Offer


@dataclass(frozen=True, slots=True)
class _Run:
    hold: bool
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class FetchHold:
    """One worker's, for one request at a time. An observer of its lifecycle."""

    def __init__(self) -> None:
        self._run = _Run(hold=False)

    def prepare(self, hold: bool) -> None:
        """Say before a request whether its fetches are held."""
        self._run = _Run(hold)

    def release(self) -> None:
        """Let go of what is held: D is to stop."""
        self._run.filled.set()

    def __call__(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        if event is Lifecycle.FILLED_SEEN:
            self.release()

    def wrap(self, inner: Importers) -> Importers:
        """What D uses in the place of its importers."""
        return _HeldImporters(inner, self)

    async def wait(self) -> None:
        """Until the present request may fetch."""
        run = self._run
        if run.hold:
            await run.filled.wait()


class _HeldImporters:
    def __init__(self, inner: Importers, hold: FetchHold) -> None:
        self._inner = inner
        self._hold = hold

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> Importer | None:
        importer = await self._inner.get(worker, incarnation, offers)
        await self._hold.wait()
        return importer

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        await self._inner.drop(worker, incarnation)

    async def close(self) -> None:
        await self._inner.close()
