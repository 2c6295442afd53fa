"""One transport's cluster, on which cases of the fault matrix are played one after the other."""

import asyncio
import dataclasses
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from bare_cluster import BareCluster
from fault_cases import (
    ENGINE,
    HANDOFF,
    INDEX,
    LINK_SHARE,
    NAMES,
    PROMPT_TOKENS,
    ROLES,
    SESSION,
    STEP_S,
    STOPPED_S,
    Case,
    Kind,
    Pids,
)
from fault_request import ask_for, judge, judge_calm, row
from fault_table import Row
from greedy_reference import GreedyReference

from pdserve.core.tasks import end_task

SETTLE_S = 20.0
POLL_S = 0.02
IN_PASSING = 3
"""Descriptors that come and go: connections of the test itself, attempts to reach somebody."""


class FaultLane:
    """P, D, a router and a redis as processes. A victim is replaced behind its case, nothing else."""

    def __init__(self, transport: str, reference: GreedyReference) -> None:
        self.transport = transport
        self._reference = reference
        self._played = 0
        self._cluster: BareCluster | None = None
        self._descriptors: dict[int, int] = {}
        """Process id -> how many it had open behind its first case."""

    @property
    def cluster(self) -> BareCluster:
        assert self._cluster is not None
        return self._cluster

    def close(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            for process in cluster.processes.values():
                process.kill()  # one may be stopped, and nothing is learnt from an orderly end
            cluster.close()

    async def play(self, case: Case) -> Row:
        """Start a request, strike it, and check all that must hold then. Raises AssertionError with the logs.

        A lane on which a case failed begins the next one with new processes.
        """
        try:
            if self._cluster is None:
                await self._start()
                await self._serve("a first request")
            return await self._play(case)
        except Exception as error:
            logs = {name: self.cluster.log_of(name)[-3000:] for name in self.cluster.processes}
            await asyncio.to_thread(self.close)
            said = "\n\n".join(f"== {name}\n{text}" for name, text in logs.items())
            raise AssertionError(f"{self.transport}, {case.name}: {error!r}\n{said}") from error

    # -- a case --------------------------------------------------------------------------------------

    async def _play(self, case: Case) -> Row:
        self._played += 1
        prompt = self._reference.prompt(f"{self.transport} {case.name} {self._played}", PROMPT_TOKENS)
        mismatches = await self._counter("D", "fetch_digest_mismatches")
        speed = (await self._ask("D", {}))["bytes_per_s"]
        slow_s = PROMPT_TOKENS * self._reference.bytes_per_token / (LINK_SHARE * speed)
        for side, faults in case.faults(self._pids()).items():
            await self._ask(side, {"arm": [dataclasses.asdict(fault) for fault in faults]})
        request = asyncio.create_task(ask_for(self.cluster.target, prompt))
        try:
            await self._strike(case)
            ended = await request
        finally:
            await end_task(request)
        fired = await self._let_go(case)
        judge(self._reference, case, prompt, ended, case.bound_s(slow_s))
        assert fired or case.kind is Kind.SIGKILL, "the fault never struck"
        if case.kind is Kind.CORRUPT:
            counted = await self._counter("D", "fetch_digest_mismatches") - mismatches
            assert counted == 1, f"{counted} mismatches were counted"
        await self._recover(case)
        await self._serve(f"behind {case.name}")
        await asyncio.to_thread(self.cluster.assert_settled, *NAMES.values(), timeout_s=SETTLE_S)
        await self._assert_nothing_kept()
        rate = f"{LINK_SHARE * speed / 1e6:.2f} MB/s" if case.kind is Kind.LINK else ""
        return row(self.transport, case, ended, case.bound_s(slow_s), rate)

    async def _strike(self, case: Case) -> None:
        """What a fault needs from outside while the request runs."""
        cluster = self.cluster
        if case.kind is Kind.SIGSTOP:
            popen = cluster.processes[NAMES[case.victim]].popen
            await _until(lambda: _is_stopped(popen.pid), "nobody was stopped")
            await asyncio.sleep(STOPPED_S)  # the fault itself
            popen.send_signal(signal.SIGCONT)
        elif case.kind is Kind.SIGKILL:
            popen = cluster.processes[NAMES[case.victim]].popen
            await _until(lambda: popen.poll() is not None, "nobody was killed")
            assert popen.returncode == -signal.SIGKILL
        elif case.kind is Kind.REDIS:
            await _until(lambda: not cluster.redis.alive(), "redis was not killed")
            for side in NAMES:  # a state that was held goes on without redis
                await self._ask(side, {"release": True})

    async def _let_go(self, case: Case) -> list[str]:
        """Disarm everybody who lives; returns what fired there."""
        fired: list[str] = []
        for side in NAMES:
            if case.kind is not Kind.SIGKILL or side != case.victim:
                fired += (await self._ask(side, {"release": True}))["fired"]
        return fired

    async def _recover(self, case: Case) -> None:
        """Replace whom the fault took away, and wait until the router sees everybody."""
        cluster, name = self.cluster, NAMES.get(case.victim, "")
        if case.kind is Kind.SIGKILL:
            survivor = next(NAMES[side] for side in NAMES if side != case.victim)
            await asyncio.to_thread(cluster.assert_settled, survivor, timeout_s=SETTLE_S)
            old = cluster.processes[name].ready["incarnation"]
            self._start_worker(case.victim)
            new = (await asyncio.to_thread(cluster.processes[name].wait_ready))["incarnation"]
            assert new != old
        elif case.kind is Kind.SIGSTOP:
            await asyncio.to_thread(self._await_fence, name)
        elif case.kind is Kind.REDIS:
            await self._serve(f"without redis, behind {case.name}")
            await asyncio.to_thread(cluster.redis.restart)
        await asyncio.to_thread(cluster.wait_ready, *NAMES.values())

    async def _serve(self, why: str) -> None:
        """A new request ends right, and as a handoff."""
        self._played += 1
        prompt = self._reference.prompt(f"{self.transport} {why} {self._played}", PROMPT_TOKENS)
        ended = await ask_for(self.cluster.target, prompt)
        judge_calm(self._reference, prompt, ended, self.transport, why)

    # -- processes -----------------------------------------------------------------------------------

    async def _start(self) -> None:
        # Children are told of the death of the thread that forked them: this one lives as long as the tests.
        handoff = dataclasses.replace(HANDOFF, transport=self.transport)
        model = str(self._reference.model)
        self._cluster = BareCluster(model=model, engine=ENGINE, handoff=handoff, session=SESSION, index=INDEX)
        for side in NAMES:
            self._start_worker(side)
        self.cluster.spawn_router()
        await asyncio.to_thread(self.cluster.await_router)
        await asyncio.to_thread(self.cluster.wait_ready, *NAMES.values())

    def _start_worker(self, side: str) -> None:
        arguments = ("--step-s", str(STEP_S))
        self.cluster.start_worker(NAMES[side], ROLES[side], module="fault_worker", arguments=arguments)

    def _pids(self) -> Pids:
        pids = {side: self.cluster.processes[name].popen.pid for side, name in NAMES.items()}
        redis = self.cluster.redis.pid
        assert redis is not None
        return Pids(P=pids["P"], D=pids["D"], redis=redis)

    async def _ask(self, side: str, command: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self.cluster.processes[NAMES[side]].ask, command)

    async def _counter(self, side: str, name: str) -> int:
        report = await asyncio.to_thread(self.cluster.inspect, NAMES[side])
        return int(report.counters.get(name, 0))

    def _await_fence(self, name: str) -> None:
        """A worker that was stopped is another incarnation; wait until it says so."""
        process = self.cluster.processes[name]
        deadline = time.monotonic() + SETTLE_S
        while (now := self.cluster.inspect(name).status.incarnation) == process.ready["incarnation"]:
            assert time.monotonic() < deadline, f"{name} was away for {STOPPED_S} s and was not fenced"
            time.sleep(POLL_S)
        process.ready["incarnation"] = now

    async def _assert_nothing_kept(self) -> None:
        """Nobody has more descriptors than behind its first case, nor the pool of a worker that is gone."""
        for name in NAMES.values():
            pid = self.cluster.processes[name].popen.pid
            pools = _mapped_pools(pid)
            assert len(pools) <= len(NAMES), (
                f"{name} has {len(pools)} pools mapped: its own, its peer's, and?"
            )
            usual = self._descriptors.setdefault(pid, _descriptors(pid))
            await _until(
                lambda pid=pid, usual=usual: _descriptors(pid) <= usual + IN_PASSING,
                f"{name} has {_descriptors(pid)} descriptors, behind its first case it had {usual}",
            )


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _mapped_pools(pid: int) -> set[str]:
    """Inodes of the KV pools that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return set(re.findall(r"(\d+) +/memfd:pdserve-kv", maps))


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def _until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(POLL_S)
