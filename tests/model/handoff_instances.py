"""The worlds that are explored: each raises one bound and leaves the others at 1."""

from collections.abc import Mapping

from handoff_explorer import Instance
from handoff_pair import Bounds


def small(**tables: object) -> dict[str, Instance]:
    """The four instances, and three that are cheap and hunt for particular faults. Seconds each."""
    one = Bounds(**tables)  # type: ignore[arg-type]
    return {
        "one handoff": Instance("one handoff", one),
        "early release": Instance(
            "a reader that asks for the release too early",
            Bounds(stray_releases=1, **tables),  # type: ignore[arg-type]
        ),
        "a stall": Instance(
            "a peer that stops to get on, in any state, and reads and heartbeats as before",
            Bounds(stalls=True, **tables),  # type: ignore[arg-type]
        ),
        "three chunks": Instance(
            "three chunks, one of which D may hold already",
            Bounds(chunks=3, reuse=(0, 1), **tables),  # type: ignore[arg-type]
        ),
        "two ranks": Instance("two consumer ranks and two filling ranks", Bounds(ranks=2, **tables)),  # type: ignore[arg-type]
        "one pool": Instance(
            "two handoffs on one pool that has room for one",
            one,
            places=((0, 1), (0, 1)),
            capacity=(1, 2),
            symmetric=True,
        ),
        "hold and wait": Instance(
            "two workers that hold blocks for each other",
            one,
            places=((0, 1), (1, 0)),
            capacity=(1, 1),
            symmetric=True,
            ample=False,
        ),
    }


def large() -> Mapping[str, Instance]:
    """Products of the raised bounds. Minutes."""
    return {
        "two chunks, two ranks": Instance(
            "two chunks on two ranks, the first of which D may hold already",
            Bounds(chunks=2, ranks=2, reuse=(0, 1)),
        ),
        "early release, one pool": Instance(
            "two handoffs on one pool that has room for one, readers that ask for the release too early",
            Bounds(stray_releases=1),
            places=((0, 1), (0, 1)),
            capacity=(1, 2),
            symmetric=True,
        ),
        "early release, hold and wait": Instance(
            "two workers that hold blocks for each other, readers that ask for the release too early",
            Bounds(stray_releases=1),
            places=((0, 1), (1, 0)),
            capacity=(1, 1),
            symmetric=True,
            ample=False,
        ),
    }
