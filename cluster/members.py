"""Which workers the cluster is meant to have, and what became of each."""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Role, WorkerId
from pdserve.core.worker_record import WorkerRecord


class MemberState(StrEnum):
    """A member's way: starting → ready → draining → gone; restarting after a death."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"


@dataclass(slots=True)
class Member:
    """One worker slot. `record` is that of its running incarnation, None while there is none."""

    worker: WorkerId
    role: Role
    model: str
    state: MemberState = MemberState.STARTING
    record: WorkerRecord | None = None
    restarts: int = 0
    role_weight: float | None = None
    """None: the role's own; else what an operator set, which a restart keeps."""
    draining: bool = False
    """An operator asked for it, which a restart keeps."""


class MemberTable:
    """Members by name, in pools keyed by model. Names are never used twice."""

    def __init__(self) -> None:
        self._members: dict[WorkerId, Member] = {}
        self._numbers: dict[Role, int] = {}

    def add(self, role: Role, model: str) -> Member:
        number = self._numbers.get(role, 0)
        self._numbers[role] = number + 1
        member = Member(worker=WorkerId(f"{role}-{number}"), role=role, model=model)
        self._members[member.worker] = member
        return member

    def get(self, worker: str) -> Member:
        """Raises InvalidRequest that names the members there are."""
        member = self._members.get(WorkerId(worker))
        if member is None:
            known = ", ".join(sorted(self._members)) or "none"
            raise InvalidRequest(f"no member is called {worker!r}: members are {known}")
        return member

    def discard(self, worker: WorkerId) -> None:
        self._members.pop(worker, None)

    def all(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def pool(self, model: str) -> tuple[Member, ...]:
        """Members that serve `model`."""
        return tuple(member for member in self._members.values() if member.model == model)

    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(member.model for member in self._members.values()))
