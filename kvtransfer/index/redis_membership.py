"""Membership in redis: one key per worker that expires unless its heart beats."""

import json
from typing import Any

from pdserve.core.types import Incarnation, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.link import UPDATE_TIMEOUT_S, RedisLink, Script
from pdserve.kvtransfer.index.membership import FENCE_S, Listing, Member, Standing

_FENCE_MS = round(FENCE_S * 1000)


class RedisMembership:
    """Membership over `link`, which the caller owns and closes.

    Keys, behind the cluster's prefix, beside those of RedisIndex:
        member:<worker>    hash: incarnation, record, load (JSON), ttl_ms; expires
        last:<worker>      the incarnation that announced itself last
        void:<worker>      set of incarnations that are fenced; expires after FENCE_S
    """

    def __init__(self, link: RedisLink, ttl_s: float = 3.0, timeout_s: float | None = None) -> None:
        """`timeout_s` None: short enough that a frozen server is noticed before anybody expires in it."""
        self._link = link
        self._ttl_ms = round(ttl_s * 1000)
        self._timeout_s = min(UPDATE_TIMEOUT_S, ttl_s / 3) if timeout_s is None else timeout_s

    async def announce(self, record: WorkerRecord, load: WorkerLoad) -> Standing:
        described = (_json(record.to_dict()), _json(load.to_dict()))
        return await self._standing(
            Script.ANNOUNCE, record.worker, record.incarnation, *described, self._ttl_ms, _FENCE_MS
        )

    async def heartbeat(self, worker: WorkerId, incarnation: Incarnation, load: WorkerLoad) -> Standing:
        return await self._standing(Script.HEARTBEAT, worker, incarnation, _json(load.to_dict()))

    async def withdraw(self, worker: WorkerId, incarnation: Incarnation) -> None:
        await self._link.run(Script.WITHDRAW, [worker, incarnation, _FENCE_MS], self._timeout_s)

    async def listing(self) -> Listing:
        run_id, *fields = await self._link.run(Script.LISTING, [], self._timeout_s)
        members: list[Member] = []
        unreadable: list[WorkerId] = []
        for worker, record, load, age_ms in zip(*(fields[at::4] for at in range(4)), strict=True):
            member = _member(record, load, age_ms)
            if member is None:
                unreadable.append(WorkerId(worker.decode()))
            else:
                members.append(member)
        members.sort(key=lambda member: member.record.worker)
        return Listing(tuple(members), run_id.decode(), tuple(sorted(unreadable)))

    async def members(self) -> tuple[Member, ...]:
        return (await self.listing()).members

    async def sweep(self, limit: int = 64) -> int:
        return int(await self._link.run(Script.SWEEP, [limit], self._timeout_s))

    async def _standing(self, script: Script, *arguments: bytes | str | int) -> Standing:
        return Standing((await self._link.run(script, arguments, self._timeout_s)).decode())


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _member(record: bytes, load: bytes, age_ms: int) -> Member | None:
    """None where the fields are those of another version."""
    try:
        described = WorkerRecord.from_dict(json.loads(record))
        return Member(described, WorkerLoad.from_dict(json.loads(load)), max(0, age_ms) / 1000)
    except (TypeError, ValueError, KeyError):
        return None
