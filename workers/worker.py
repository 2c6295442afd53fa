"""One worker: the engine with its pool, both roles over it, and their gRPC faces. Built in one place.

    gRPC Worker.Session ──► DecodeRole ──► DecodeHandoffs ──► (another worker's HandoffServicer)
                                │                                        │
    gRPC Handoff ──► HandoffServicer ──► EngineFiller                    │
                                │             │                          ▼
                                └── KvPool ◄──┴── engine thread     KvStorage ◄── transports
"""

import asyncio
import dataclasses
import logging
import os

import grpc

from pdserve.core.channel_options import SERVER_OPTIONS
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import PdserveError, Unavailable, WorkerLost
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import Role, new_incarnation
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.handoff.consumer import DecodeHandoffs
from pdserve.kvtransfer.handoff.producer import HandoffServicer
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.proto import handoff_pb2_grpc, worker_pb2, worker_pb2_grpc
from pdserve.workers import convert
from pdserve.workers.announcements import Announcements
from pdserve.workers.decode_role import DecodeRole
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.engine.client import ThreadEngineClient
from pdserve.workers.engine.engine import Engine, EngineModel
from pdserve.workers.engine.torch_runner import TorchRunner
from pdserve.workers.model_host import ModelHost
from pdserve.workers.prefill_role import EngineFiller
from pdserve.workers.seams import Seams
from pdserve.workers.servicer import WorkerServicer
from pdserve.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0


class Worker:
    """Everything of one worker. `start` once, `stop` once; an incarnation may change in between."""

    def __init__(self, spec: WorkerSpec, *, clock: Clock | None = None, seams: Seams | None = None) -> None:
        self.spec = spec
        self.clock = clock or MonotonicClock()
        self._seams = seams or Seams()
        self._record: WorkerRecord | None = None
        self._started: list[str] = []

    @property
    def incarnation(self) -> str:
        return self.record().incarnation

    def record(self) -> WorkerRecord:
        """Who this worker is now. Raises Unavailable before it listens."""
        if self._record is None:
            raise Unavailable(f"worker {self.spec.worker} has not started yet")
        return self._record

    async def start(self) -> None:
        """Load, listen, announce; returns when requests can be served."""
        model = await asyncio.to_thread(ModelHost.load, self.spec)
        self.storage = model.storage
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        port = self._server.add_insecure_port(f"{self.spec.host}:{self.spec.port}")
        self._record = self._first_record(model, port)
        self._announcements = Announcements(
            config=self.spec.index,
            record=self.record,
            load=self.load,
            snapshot=lambda: self.pool.names(),
            fence=self.fence,
            fence_after_s=self.spec.session.reattach_s,
            clock=self.clock,
        )
        self._assemble(model)
        await self.engine.start()
        self.dispatcher.start()
        await self.prefill.start()
        await self._server.start()
        await self._announcements.start()
        log.info("ready as %s at %s", self.incarnation, self.record().endpoint)

    async def stop(self) -> None:
        """Leave the cluster, end what runs, give all memory back. Safe after a start that failed half way."""
        if self._record is None:
            return
        await self._announcements.stop()
        if self._assembled:
            self.decode.fail_all(WorkerLost(f"worker {self.spec.worker} is stopping: try again"))
            await self.decode.until_idle(STOP_GRACE_S)
            self._servicer.close_sessions()
            await self._server.stop(STOP_GRACE_S)
            await self.handoffs.close()
            await self.prefill.close()
            await self.engine.stop()
            await self.dispatcher.stop()
        self.storage.close()
        self._record = None
        log.info("stopped")

    async def drain(self, grace_s: float) -> int:
        """Take nothing new; finish exposed handoffs and streams within `grace_s`, then fail the rest.

        Returns how many requests failed, as retriable.
        """
        self._record = dataclasses.replace(self.record(), draining=True)
        self.prefill.draining = True
        await self._announce()
        failed, _ = await asyncio.gather(self.decode.drain(grace_s), self.prefill.until_idle(grace_s))
        return failed

    async def set_role_weight(self, weight: float) -> None:
        """Spend another share of the token budget on prefill; what runs stays."""
        self.engine.set_role_weight(weight)
        self._record = dataclasses.replace(self.record(), role_weight=weight)
        await self._announce()

    async def fence(self, reason: str) -> None:
        """This incarnation counts no more: end its requests, be another one, announce the cache anew."""
        old = self.record()
        self._record = dataclasses.replace(old, incarnation=new_incarnation())
        log.warning("incarnation %s is over, %s follows: %s", old.incarnation, self.incarnation, reason)
        self.decode.fail_all(WorkerLost(f"worker {self.spec.worker} was away: {reason}"))
        self.prefill.renew(self._record.incarnation)
        self.handoffs.renew(self._record.incarnation)
        self._servicer.close_sessions()
        await self._announcements.renew()

    # -- what it says of itself ----------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        """Work and memory now."""
        counts = self.pool.counts()
        stats = self.engine.stats()
        return WorkerLoad(
            queued_prefill_tokens=stats.queued_prefill_tokens,
            running=stats.running,
            waiting=stats.waiting,
            context_tokens=stats.context_tokens,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            promised_blocks=counts.promised,
            total_blocks=counts.total,
            progress=stats.progress,
            perf_model=dict(stats.perf),
        )

    def heartbeat(self) -> worker_pb2.WorkerHeartbeat:
        """What every session hears a few times a second."""
        load = self.load()
        described = convert.worker_load(
            self.record(), load, self.pool.counts(), self._handoff_count(), self.decode.in_flight()
        )
        return worker_pb2.WorkerHeartbeat(progress=load.progress, load=described)

    def inspect(self) -> worker_pb2.InspectResponse:
        """A snapshot, with all books checked."""
        record, load, counts = self.record(), self.load(), self.pool.counts()
        handoffs, in_flight = self._handoff_count(), self.decode.in_flight()
        return worker_pb2.InspectResponse(
            status=convert.worker_status(record, load, counts, handoffs, in_flight),
            load=convert.worker_load(record, load, counts, handoffs, in_flight),
            integrity_error=self._integrity_error(),
            counters=self._counters(),
        )

    def _integrity_error(self) -> str:
        try:
            self.pool.check_integrity()
            self.engine.check_integrity()
            self.handoffs.check_integrity()
            self.prefill.check_integrity()
        except PdserveError as error:
            return error.message
        return ""

    def _counters(self) -> dict[str, int]:
        sources = {"decode": self.decode.counters, "fetch": self.handoffs.counters, "serve": self.prefill.counters}
        counters = {f"{source}_{name}": n for source, found in sources.items() for name, n in found.items()}
        counters["engine_preemptions"] = self.engine.stats().preemptions
        return counters

    def _handoff_count(self) -> int:
        return self.handoffs.in_flight() + self.prefill.in_flight()

    async def _announce(self) -> None:
        try:
            await self._announcements.announce()
        except IndexUnavailable as error:
            log.warning("the change is not announced yet: %s", error)  # the next heartbeat does it
