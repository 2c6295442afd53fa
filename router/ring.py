"""The consistent hash ring over worker names."""

from collections.abc import Callable, Iterable

import uhashring

from pdserve.core.types import WorkerId


class WorkerRing:
    """Immutable. A key's owners stay the same while they live: a leaving worker moves only its own keys."""

    def __init__(self, workers: Iterable[WorkerId]) -> None:
        self.workers = tuple(sorted(set(workers)))
        self._ring = uhashring.HashRing(nodes=list(self.workers))

    def owners(
        self, key: bytes, count: int, eligible: Callable[[WorkerId], bool] = lambda worker: True
    ) -> tuple[WorkerId, ...]:
        """The first `count` distinct eligible workers clockwise of `key`; fewer if there are no more."""
        found: list[WorkerId] = []
        if not self.workers:
            return ()
        for node in self._ring.range(key.hex()):
            if len(found) == count:
                break
            worker = WorkerId(node["nodename"])
            if eligible(worker):
                found.append(worker)
        return tuple(found)
