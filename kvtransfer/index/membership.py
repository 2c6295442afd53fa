"""Who is in the cluster: the contract between the workers that announce themselves and those that look."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pdserve.core.types import Incarnation, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord

FENCE_S = 3600.0
"""How long a replaced incarnation is remembered, so that it cannot announce itself again."""


class Standing(StrEnum):
    """What an incarnation is to the cluster."""

    CURRENT = "current"
    UNKNOWN = "unknown"
    """Not listed (it expired, or the server is new): announce again, as the same incarnation."""
    FENCED = "fenced"
    """Replaced or withdrawn: abort what is running, take a new incarnation, announce that."""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that was alive `age_s` seconds before it was listed."""

    record: WorkerRecord
    load: WorkerLoad
    age_s: float


@dataclass(frozen=True, slots=True)
class Listing:
    """One answer of the server."""

    members: tuple[Member, ...]
    """Ordered by worker id."""
    run_id: str
    """Of the server: another one than before means that it started anew and may have lost everything."""
    unreadable: tuple[WorkerId, ...] = ()
    """Members of another version of pdserve, left out."""


class Membership(Protocol):
    """Every method raises IndexUnavailable within its time-out instead of waiting on."""

    async def announce(self, record: WorkerRecord, load: WorkerLoad) -> Standing:
        """List the worker. An earlier incarnation of it is fenced and its blocks leave the index at once.

        Again with the same incarnation: the record is replaced (draining, another role weight). Answers
        CURRENT, or FENCED where a later incarnation was here already.
        """
        ...

    async def heartbeat(self, worker: WorkerId, incarnation: Incarnation, load: WorkerLoad) -> Standing:
        """Stay listed for another time to live."""
        ...

    async def withdraw(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """Leave for good, with all blocks. Idempotent; a later incarnation is untouched."""
        ...

    async def listing(self) -> Listing:
        """All members that have not expired, in one round trip."""
        ...

    async def members(self) -> tuple[Member, ...]:
        """Just the members of `listing`."""
        ...

    async def sweep(self, limit: int = 64) -> int:
        """Remove index entries of holders that are not members, looking at `limit` workers at most.

        Returns how many holders went. Never needed for correct answers: `locate` asks for members only.
        """
        ...
