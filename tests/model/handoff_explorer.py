"""Breadth-first exploration of handoffs that share pools: every order of every step, then every property."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from handoff_pair import FAIR, SQUEEZE, Bounds, Pair, Step, Violation, committed, ended

SHIFT = 24


@dataclass(frozen=True)
class Instance:
    """`places[i]` is (D's pool, P's pool) of handoff i; pools hold `capacity` blocks each.

    All handoffs have the same bounds. Where exchanging the handoffs (and with them the pools) leaves the
    instance as it is, only one of each two mirrored states is visited.
    """

    name: str
    bounds: Bounds
    places: tuple[tuple[int, int], ...] = ((0, 1),)
    capacity: tuple[int, ...] = (9, 9)
    symmetric: bool = False
    ample: bool = True
    """Nobody waits for what another waiting one holds: handoffs end without a downgrade, and without a fault
    all of them commit."""


@dataclass
class Report:
    """What an exploration saw."""

    name: str
    states: int = 0
    steps: int = 0
    pair_states: int = 0
    ends: int = 0
    commits: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.states} states ({self.pair_states} of one handoff), {self.steps} steps, "
            f"{self.ends} ends, {self.commits} of them with a commit"
        )


@dataclass
class _Node:
    """One state of one handoff: its claims on the pools, and its steps with the states they lead to."""

    pair: Pair
    decode_blocks: int
    prefill_blocks: int
    steps: list[tuple[object, int, int, int, int, int]] | None = None
    """(label, kind, next, least free at D, free at D below, least free at P)"""


@dataclass
class _Pairs:
    """The states of one handoff, numbered as they are met."""

    bounds: Bounds
    nodes: list[_Node] = field(default_factory=list)
    _numbers: dict[Pair, int] = field(default_factory=dict)

    def number(self, pair: Pair) -> int:
        found = self._numbers.get(pair)
        if found is None:
            self.bounds.check(pair)
            found = self._numbers[pair] = len(self.nodes)
            held = sum(1 for state in pair.blocks if state)
            self.nodes.append(_Node(pair, held, self.bounds.chunks if pair.pinned else 0))
        return found

    def steps(self, number: int) -> list[tuple[object, int, int, int, int, int]]:
        node = self.nodes[number]
        if node.steps is None:
            node.steps = [self._step(step) for step in self.bounds.steps(node.pair)]
        return node.steps

    def _step(self, step: Step) -> tuple[object, int, int, int, int, int]:
        lacks = 1 << 30 if step.decode_lacks is None else step.decode_lacks
        return (step.label, step.kind, self.number(step.after), step.decode_needs, lacks, step.prefill_needs)


class Explorer:
    """Visits all states of an instance. Raises Violation with the way to the first bad one."""

    def __init__(self, instance: Instance, limit: int = 20_000_000) -> None:
        self._instance = instance
        self._limit = limit
        self._pairs = _Pairs(instance.bounds)
        self._order: list[tuple[int, ...]] = []
        self._index: dict[tuple[int, ...], int] = {}
        self._parents: list[int] = []
        self._calm: tuple[list[int], list[int]] = ([], [])
        self._steps = 0

    def run(self) -> Report:
        """Explore, then check that every state can end without a fault's help."""
        start = self._pairs.number(self._instance.bounds.initial())
        self._visit((start,) * len(self._instance.places), 0)
        at = 0
        while at < len(self._order):
            state = self._order[at]
            try:
                self._expand(at, state)
            except Violation as error:
                raise Violation(f"{self._instance.name}: {error}\n{self._way(at)}") from None
            at += 1
        ends = self._check_liveness()
        self._check_fault_free(ends)
        nodes = self._pairs.nodes
        commits = sum(any(committed(nodes[n].pair) for n in self._order[end]) for end in ends)
        states = len(self._order)
        return Report(self._instance.name, states, self._steps, len(nodes), len(ends), commits)

    def _visit(self, state: tuple[int, ...], parent: int) -> int:
        if self._instance.symmetric and state[0] > state[-1]:
            state = state[::-1]
        found = self._index.get(state)
        if found is None:
            found = self._index[state] = len(self._order)
            if found >= self._limit:
                raise Violation(f"{self._instance.name} has more than {self._limit} states")
            self._order.append(state)
            self._parents.append(parent)
        return found

    def _expand(self, at: int, state: tuple[int, ...]) -> None:
        free = self._free(state)
        sources, targets = self._calm
        for place, number in enumerate(state):
            decode_free, prefill_free = (free[pool] for pool in self._instance.places[place])
            for _, kind, after, needs, lacks, prefill_needs in self._pairs.steps(number):
                if decode_free < needs or decode_free >= lacks or prefill_free < prefill_needs:
                    continue
                self._steps += 1
                target = self._visit((*state[:place], after, *state[place + 1 :]), at)
                if target != at and (kind == FAIR or (kind == SQUEEZE and not self._instance.ample)):
                    sources.append(at)
                    targets.append(target)

    def _free(self, state: tuple[int, ...]) -> list[int]:
        free = list(self._instance.capacity)
        for number, (decode_pool, prefill_pool) in zip(state, self._instance.places, strict=True):
            node = self._pairs.nodes[number]
            free[decode_pool] -= node.decode_blocks
            free[prefill_pool] -= node.prefill_blocks
        if min(free) < 0:
            raise Violation(f"a pool gave out more blocks than it has: {free} left")
        return free

    def _check_liveness(self) -> list[int]:
        """Every state reaches an end by steps that happen if one waits. Returns the ends."""
        nodes = self._pairs.nodes
        done = {number for number, node in enumerate(nodes) if ended(node.pair)}
        ends = [at for at, state in enumerate(self._order) if done.issuperset(state)]
        alive = np.zeros(len(self._order), bool)
        alive[ends] = True
        sources, targets = (np.array(column, np.int64) for column in self._calm)
        while True:
            fresh = np.unique(sources[alive[targets] & ~alive[sources]])
            if not fresh.size:
                break
            alive[fresh] = True
        stuck = np.flatnonzero(~alive)
        if stuck.size:
            raise Violation(
                f"{self._instance.name}: {stuck.size} states cannot end without a fault, the first:\n"
                f"{self._way(int(stuck[0]))}"
            )
        return ends

    def _check_fault_free(self, ends: list[int]) -> None:
        """Where nothing goes wrong and there is room, every handoff commits."""
        if not self._instance.ample:
            return
        onward: dict[int, list[int]] = {}
        for source, target in zip(*self._calm, strict=True):
            onward.setdefault(source, []).append(target)
        seen, todo = {0}, [0]
        while todo:
            at = todo.pop()
            fresh = [target for target in onward.get(at, ()) if target not in seen]
            seen.update(fresh)
            todo.extend(fresh)
        nodes = self._pairs.nodes
        for end in seen.intersection(ends):
            if not all(committed(nodes[number].pair) for number in self._order[end]):
                raise Violation(f"{self._instance.name}: no fault, and not served:\n{self._way(end)}")

    def _way(self, at: int) -> str:
        """The labels from the start to state `at`."""
        path = [at]
        while path[-1]:
            path.append(self._parents[path[-1]])
        path.reverse()
        lines = [self._label(before, after) for before, after in pairwise(path)]
        return "  " + "\n  ".join(lines)

    def _label(self, before: int, after: int) -> str:
        for place, label, state in self._labelled(self._order[before]):
            mirrored = state[::-1] if self._instance.symmetric else state
            if self._order[after] in (state, mirrored):
                return f"[{place}] {label}"
        return "?"

    def _labelled(self, state: tuple[int, ...]) -> Iterator[tuple[int, object, tuple[int, ...]]]:
        for place, number in enumerate(state):
            for step in self._pairs.nodes[number].steps or ():
                yield place, step[0], (*state[:place], step[2], *state[place + 1 :])


def explore(instance: Instance) -> Report:
    """Explore one instance; raises Violation."""
    return Explorer(instance).run()
