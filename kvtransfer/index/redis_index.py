"""The index in redis: one set of names per holder, searched on the server."""

from collections.abc import Sequence

from pdserve.core.types import BlockName, Incarnation, WorkerId
from pdserve.kvtransfer.index.base import LOCATE_LIMIT, Holder, Holding, Location, Update
from pdserve.kvtransfer.index.link import UPDATE_TIMEOUT_S, RedisLink, Script
from pdserve.kvtransfer.names import pack_chain


class RedisIndex:
    """LocationIndex over `link`, which the caller owns and closes.

    Keys, behind the cluster's prefix:
        workers                            set of worker ids that have any of the keys below
        held:<worker>                      set of incarnations with blocks
        blocks:<worker>:<incarnation>      set of names, 16 bytes each
        holding:<worker>:<incarnation>     hash: seq, representation
    """

    def __init__(
        self, link: RedisLink, locate_timeout_s: float = 0.05, update_timeout_s: float = UPDATE_TIMEOUT_S
    ) -> None:
        self._link = link
        self._locate_timeout_s = locate_timeout_s
        self._update_timeout_s = update_timeout_s

    async def locate(self, names: Sequence[BlockName], holders: Sequence[Holder]) -> dict[WorkerId, Location]:
        if not names or not holders:
            return {}
        arguments: list[bytes | str | int] = [pack_chain(names[:LOCATE_LIMIT])]
        for holder in holders:
            arguments += (holder.worker, holder.incarnation)
        answer = await self._link.run(Script.LOCATE, arguments, self._locate_timeout_s)
        depths, representations = answer[0::2], answer[1::2]
        return {
            holder.worker: Location(depth, representation.decode())
            for holder, depth, representation in zip(holders, depths, representations, strict=True)
            if depth > 0
        }

    async def add(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        return await self._apply("add", worker, incarnation, seq, names, representation)

    async def remove(
        self, worker: WorkerId, incarnation: Incarnation, seq: int, names: Sequence[BlockName]
    ) -> Update:
        return await self._apply("remove", worker, incarnation, seq, names, "")

    async def replace(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        return await self._apply("replace", worker, incarnation, seq, names, representation)

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        await self._link.run(Script.DROP, [worker, incarnation], self._update_timeout_s)

    async def dump(self) -> dict[Holder, Holding]:
        answer = await self._link.run(Script.HOLDERS, [], self._update_timeout_s)
        found: dict[Holder, Holding] = {}
        for worker, incarnation, seq, representation in zip(*(answer[at::4] for at in range(4)), strict=True):
            holder = Holder(WorkerId(worker.decode()), Incarnation(incarnation.decode()))
            key = self._link.key("blocks", holder.worker, holder.incarnation)
            names = await self._link.scan_set(key, self._update_timeout_s)
            found[holder] = Holding(int(seq), representation.decode(), frozenset(map(BlockName, names)))
        return found

    async def _apply(
        self,
        change: str,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        arguments = (change, worker, incarnation, seq, representation, pack_chain(names))
        answer = await self._link.run(Script.APPLY, arguments, self._update_timeout_s)
        return Update(answer.decode())
