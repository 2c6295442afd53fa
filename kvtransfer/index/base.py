"""The index of blocks: worker -> how many leading blocks of a chain it holds.

    write path   KvPool --stored/removed--> CacheAnnouncer --add/remove/replace, numbered--> LocationIndex
    read path    router --locate(chain, live workers)--> LocationIndex --> {worker: Location}

Entries belong to a holder: one incarnation of one worker. A new incarnation starts with nothing.

Updates of one holder carry sequence numbers 1, 2, 3 …; one announcer per holder issues them. A number that
is not the next one means that the index lost something: it changes nothing and answers GAP, and the announcer
sends everything again by `replace`, whose number only has to be higher than the last one. A number that was
already used answers STALE: a late duplicate, harmless.

Holdings are prefix-closed: a holder has a block's parents as long as it has the block, because pools evict
children first. Where that is broken for a moment, `locate` may say any depth that ends in front of a hole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockName, Incarnation, WorkerId

LOCATE_LIMIT = 8192
"""Most names of a chain that `locate` looks at; a longer chain counts as its first 8,192 blocks."""


class IndexUnavailable(Unavailable):
    """The index gave no answer in its time. A reader goes on without it; a writer announces in full later."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds blocks: one start of a worker."""

    worker: WorkerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Location:
    """What a worker holds of a chain."""

    depth: int
    """Leading blocks, at least 1."""
    representation: str
    """How the holder keeps them (dtype, splits, page order), as it announced it."""
    tier: str = "device"


@dataclass(frozen=True, slots=True)
class Holding:
    """Everything that the index knows of one holder."""

    seq: int
    representation: str
    names: frozenset[BlockName]


class Update(StrEnum):
    """What became of an update."""

    APPLIED = "applied"
    STALE = "stale"
    """Its number was used before; nothing changed."""
    GAP = "gap"
    """Something before it is missing; nothing changed; the holder must `replace`."""


class LocationIndex(Protocol):
    """Every method raises IndexUnavailable within its time-out instead of waiting on."""

    async def locate(self, names: Sequence[BlockName], holders: Sequence[Holder]) -> dict[WorkerId, Location]:
        """How many leading blocks of `names` each holder has, in one round trip.

        Counting stops at a holder's first miss. Holders without the first block are absent from the answer.
        """
        ...

    async def add(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        """The holder has `names` too, parents first. No names: only checks that nothing was lost.

        A holder has one representation: another one than before answers GAP.
        """
        ...

    async def remove(
        self, worker: WorkerId, incarnation: Incarnation, seq: int, names: Sequence[BlockName]
    ) -> Update:
        """The holder has `names` no more, children first."""
        ...

    async def replace(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        """The holder has exactly `names`. Never answers GAP."""
        ...

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """Forget the holder, in O(1) of the server's time. Idempotent."""
        ...

    async def dump(self) -> dict[Holder, Holding]:
        """Everything, for people and tests; not atomic against updates."""
        ...
