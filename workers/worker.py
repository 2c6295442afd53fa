"""One worker: the engine with its pool, both roles over it, and their gRPC faces. Built in one place.

gRPC Worker.Session ──► DecodeRole ──► DecodeHandoffs ──► (another worker's HandoffServicer)
                            │                                        │
gRPC Handoff ──► HandoffServicer ──► EngineFiller                    │
                            │             │                          ▼
                            └── KvPool ◄──┴── engine thread     KvStorage ◄── transports
"""

import asyncio
import contextlib
import dataclasses
import logging
import os

import grpc

from pdserve.core.channel_options import SERVER_OPTIONS
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import PdserveError, WorkerLost
from pdserve.core.perfmodel import PerfModel, TransferRecord
from pdserve.core.security.cluster_tls import WorkerTls
from pdserve.core.security.tls import SocketTls
from pdserve.core.types import Incarnation, Role, new_incarnation
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.handoff.consumer import DecodeHandoffs
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixFetch
from pdserve.kvtransfer.handoff.producer import HandoffServicer
from pdserve.kvtransfer.index.base import IndexUnavailable
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, accepted
from pdserve.kvtransfer.transports.importers import ImporterCache, RungUse
from pdserve.kvtransfer.transports.ladder import make_exporters
from pdserve.proto import handoff_pb2_grpc, worker_pb2, worker_pb2_grpc
from pdserve.proto.connections import listen
from pdserve.workers import convert
from pdserve.workers.announcements import Announcements
from pdserve.workers.decode_limits import DecodeLimits
from pdserve.workers.decode_role import DecodeRole
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.engine.client import ThreadEngineClient
from pdserve.workers.engine.engine import Engine
from pdserve.workers.engine.engine_model import EngineModel
from pdserve.workers.engine.torch_runner import TorchRunner
from pdserve.workers.model_host import ModelHost
from pdserve.workers.peers import PeerMeetings
from pdserve.workers.prefill_lessons import PrefillLessons
from pdserve.workers.prefill_role import EngineFiller
from pdserve.workers.seams import Seams
from pdserve.workers.servicer import WorkerServicer
from pdserve.workers.spec import WorkerSpec
from pdserve.workers.text_preparation import TextPreparation
from pdserve.workers.worker_use import TransportUse, WorkerUse

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0


class Worker:
    """Everything of one worker. `start` once, `stop` once; its incarnation may change in between.

    Takes `model` over. Must be made on the event loop that serves it.
    """

    def __init__(
        self, spec: WorkerSpec, model: ModelHost, *, clock: Clock | None = None, seams: Seams | None = None
    ) -> None:
        self.spec = spec
        self.clock = clock or MonotonicClock()
        self.storage = model.storage
        seams = seams or Seams()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._tls = WorkerTls.load(spec.security)
        port = listen(
            self._server, f"{spec.host}:{spec.port}", None if self._tls is None else self._tls.server
        )
        self._record = _first_record(spec, model, port)
        self._announcements = Announcements(
            config=spec.index,
            record=self.record,
            load=self.load,
            snapshot=lambda: self.pool.names(),
            fence=self.fence,
            # A session that is never kept is no reason to fence at each hiccup.
            fence_after_s=max(spec.session.reattach_s, spec.session.silence_s),
            clock=self.clock,
        )
        self.pool = KvPool(
            model.storage.layout,
            spec.engine.pool_blocks,
            model.storage.generations,
            self._announcements.listener,
            overbook=spec.engine.overbook,
        )
        self._decoder = model.decoder
        self._perf = PerfModel()
        self._texts = TextPreparation(model.constraints.compiled)
        self.engine = seams.engine(self._make_engine(model, seams))
        self.dispatcher = OutputDispatcher(self.engine, self._engine_failed)
        self._importers = ImporterCache(
            self.storage, accepted(spec.handoff.transport), tls=self._socket_tls()
        )
        self.handoffs = self._make_handoffs(seams)
        self.prefixes = PrefixFetch(
            record=self.record,
            pool=self.pool,
            handoffs=self.handoffs,
            ways=self._importers.ways,
            perf=self._perf,
            chunk_tokens=spec.engine.chunk_tokens,
            clock=self.clock,
        )
        self.prefill = self._make_prefill(seams)
        self.decode = DecodeRole(
            record=self.record,
            pool=self.pool,
            copy_blocks=self.storage.copy_blocks,
            prepare=self._texts.prepare,
            dispatcher=self.dispatcher,
            handoffs=self.handoffs,
            prefixes=self.prefixes,
            engine_config=spec.engine,
            session_config=spec.session,
            clock=self.clock,
            observer=seams.observer,
            first_token=PrefillLessons(
                self._perf,
                chunk_tokens=spec.engine.chunk_tokens,
                block_bytes=model.storage.layout.block_bytes,
            ).first_token,
        )
        self._peers = PeerMeetings(
            record=self.record,
            view=self._announcements.view,
            meet=self.handoffs.meet,
            part=self.handoffs.part,
            most=self._importers.capacity,
        )
        self.limits = DecodeLimits.of(self._record)
        self._failure: PdserveError | None = None
        self._ready_at: float | None = None
        self._transports: dict[str, TransportUse] = {}
        self._failed = asyncio.Event()
        self._servicer = WorkerServicer(self)
        worker_pb2_grpc.add_WorkerServicer_to_server(self._servicer, self._server)
        handoff_pb2_grpc.add_HandoffServicer_to_server(self.prefill, self._server)

    @property
    def incarnation(self) -> Incarnation:
        return self._record.incarnation

    def record(self) -> WorkerRecord:
        """Who this worker is now."""
        return self._record

    async def start(self) -> None:
        """Listen, meet the prefill workers, announce; returns when requests can be served."""
        await asyncio.to_thread(load_kernel)  # built here where the machine has not: no request waits for it
        await self.engine.start()
        self.dispatcher.start()
        await self.prefill.start()
        await self._server.start()
        await self._peers.start()
        await self._announcements.start()
        self._ready_at = self.clock.now()
        log.info("ready as %s at %s", self.incarnation, self._record.endpoint)

    async def failed(self) -> PdserveError:
        """Wait until this worker can serve no more, if ever: its engine ended. Returns why."""
        await self._failed.wait()
        assert self._failure is not None  # set before the event
        return self._failure

    async def stop(self) -> None:
        """Leave the cluster, end what runs, give all memory back. A step that fails stops no other."""
        self._take_nothing_new()
        async with contextlib.AsyncExitStack() as steps:  # last in, first out
            steps.callback(log.info, "stopped")
            steps.callback(self.storage.close)
            steps.push_async_callback(self.dispatcher.stop)
            steps.push_async_callback(self.engine.stop)
            steps.push_async_callback(self.prefill.close)
            steps.push_async_callback(self.handoffs.close)
            steps.push_async_callback(self._server.stop, STOP_GRACE_S)
            steps.callback(self._servicer.close_sessions)
            steps.push_async_callback(self._end_requests)
            steps.push_async_callback(self._announcements.stop)
            steps.push_async_callback(self._peers.stop)

    async def drain(self, grace_s: float) -> int:
        """Take nothing new; finish exposed handoffs and streams within `grace_s`, then fail the rest.

        Returns how many requests failed, as retriable.
        """
        self._take_nothing_new()
        await self._announce()
        failed, _ = await asyncio.gather(self.decode.drain(grace_s), self.prefill.until_idle(grace_s))
        self.prefill.abort_all(f"{self.spec.worker} was drained")
        await asyncio.gather(self.decode.until_idle(STOP_GRACE_S), self.prefill.until_idle(STOP_GRACE_S))
        return failed

    async def set_role_weight(self, weight: float) -> None:
        """Spend another share of the token budget on prefill; what runs stays."""
        self.engine.set_role_weight(weight)
        self._record = dataclasses.replace(self._record, role_weight=weight)
        self._peers.look()
        await self._announce()

    def break_sessions(self) -> None:
        """End every session, as a failing network would; routers come back and attach."""
        self._servicer.break_sessions()

    async def fence(self, reason: str) -> None:
        """This incarnation counts no more: end its requests, be another one, announce the cache anew."""
        old = self._record
        self._record = dataclasses.replace(old, incarnation=new_incarnation())
        log.warning("incarnation %s is over, %s follows: %s", old.incarnation, self.incarnation, reason)
        self.decode.void(WorkerLost(f"worker {self.spec.worker} was away: {reason}"))
        self.prefill.abort_all(reason)
        self.handoffs.abort_all(reason)
        self._servicer.close_sessions()
        await self._announcements.renew()

    # -- what it says of itself ----------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        """Work and memory now."""
        counts = self.pool.counts()
        stats = self.engine.stats()
        return WorkerLoad(
            queued_prefill_tokens=stats.queued_prefill_tokens,
            queued_prefills=stats.queued_prefills,
            prefills=stats.prefills,
            prefill_busy_s=stats.prefill_busy_s,
            running=stats.running,
            waiting=stats.waiting,
            context_tokens=stats.context_tokens,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            promised_blocks=counts.promised,
            total_blocks=counts.total,
            progress=self._progress(),
            perf_model=dict(stats.perf),
            ways={str(peer): transport for peer, transport in self._importers.ways().items()},
        )

    def use(self) -> WorkerUse:
        """What it has done since it started."""
        uptime_s = 0.0 if self._ready_at is None else self.clock.now() - self._ready_at
        rungs = self._importers.rungs()
        transports = {
            name: dataclasses.replace(
                self._transports.get(name, TransportUse()), **rungs.get(name, RungUse())._asdict()
            )
            for name in {*self._transports, *rungs}
        }
        return WorkerUse(uptime_s, self.engine.stats().preemptions, transports)

    def heartbeat(self) -> worker_pb2.WorkerHeartbeat:
        """What every session hears a few times a second."""
        load = self.load()
        described = convert.worker_load(
            self.record(),
            load,
            self.pool.counts(),
            self._handoff_count(),
            self.decode.in_flight(),
            self.use(),
        )
        return worker_pb2.WorkerHeartbeat(progress=load.progress, load=described)

    async def inspect(self) -> worker_pb2.InspectResponse:
        """A snapshot, with all books checked."""
        integrity_error = await self._integrity_error()
        record, load, counts = self.record(), self.load(), self.pool.counts()
        handoffs, in_flight, use = self._handoff_count(), self.decode.in_flight(), self.use()
        return worker_pb2.InspectResponse(
            status=convert.worker_status(record, load, counts, handoffs, in_flight, use),
            load=convert.worker_load(record, load, counts, handoffs, in_flight, use),
            integrity_error=integrity_error,
            counters=self._counters(),
        )

    def _make_engine(self, model: ModelHost, seams: Seams) -> ThreadEngineClient:
        config = self.spec.engine
        limits = EngineModel(
            max_positions=model.decoder.config.max_position_embeddings,
            eos_ids=model.tokenizer.eos_ids,
            detokenizers=model.tokenizer.detokenizer,
            constraints=model.constraints.matcher,
            stops=self._texts.stops,
        )
        runner = seams.runner(TorchRunner(model.decoder, model.storage.tensor))
        engine = Engine(
            config, limits, self.pool, runner, self.clock, self._perf, role_weight=self.spec.role_weight
        )
        return ThreadEngineClient(engine, threads=config.threads, name=f"engine-{self.spec.worker}")

    def _make_handoffs(self, seams: Seams) -> DecodeHandoffs:
        return DecodeHandoffs(
            record=self.record,
            pool=self.pool,
            storage=self.storage,
            importers=seams.importers(self._importers),
            config=self.spec.handoff,
            progress=self._progress,
            clock=self.clock,
            observer=seams.observer,
            transferred=self._transferred,
            relieve=lambda blocks: self.prefill.relieve(blocks),
            preempted=lambda: self.engine.stats().preempted_blocks,
            perf=self._perf,
            tls=None if self._tls is None else self._tls.client,
            channel=seams.channel,
        )

    def _make_prefill(self, seams: Seams) -> HandoffServicer:
        exporters = make_exporters(
            self.storage, TRANSPORT_LADDER, host=self.spec.host, tls=self._socket_tls()
        )
        filler = EngineFiller(self.engine, self.dispatcher, self.spec.engine.chunk_tokens, self.clock)
        return HandoffServicer(
            record=self.record,
            pool=self.pool,
            storage=self.storage,
            filler=seams.filler(filler),
            exporters=[seams.exporter(exporter) for exporter in exporters],
            config=self.spec.handoff,
            progress=self._progress,
            clock=self.clock,
            observer=seams.observer,
            prefixes=self.prefixes,
        )

    def _socket_tls(self) -> SocketTls | None:
        return None if self._tls is None else self._tls.sockets

    def _take_nothing_new(self) -> None:
        self._record = dataclasses.replace(self._record, draining=True)
        self.decode.draining = True

    async def _end_requests(self) -> None:
        self.decode.fail_all(WorkerLost(f"worker {self.spec.worker} is stopping: try again"))
        await self.decode.until_idle(STOP_GRACE_S)

    def _engine_failed(self, error: PdserveError) -> None:
        """All sequences have failed by now; only a new process has a new engine."""
        self._take_nothing_new()
        self.handoffs.abort_all(error.message)
        self.prefill.abort_all(error.message)
        self._failure = error
        self._failed.set()

    def _progress(self) -> int:
        """Steps, and the layers within them: a step that takes seconds is work, not silence."""
        return self.engine.stats().progress + self._decoder.layers_run

    def _transferred(self, num_bytes: int, seconds: float, transport: str) -> None:
        self._perf.observe_transfer(TransferRecord(seconds, num_bytes, transport))
        used = self._transports.get(transport, TransportUse())
        self._transports[transport] = used.plus(num_bytes, seconds)

    async def _integrity_error(self) -> str:
        try:
            await asyncio.to_thread(self.engine.check_integrity)  # waits for a step, or two
            self.handoffs.check_integrity()
            self.prefill.check_integrity()
        except PdserveError as error:
            return error.message
        return ""

    def _counters(self) -> dict[str, int]:
        sources = {
            "decode": self.decode.counters,
            "fetch": self.handoffs.counters,
            "prefix": self.prefixes.counters,
            "serve": self.prefill.counters,
        }
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


def _first_record(spec: WorkerSpec, model: ModelHost, port: int) -> WorkerRecord:
    config = model.decoder.config
    return WorkerRecord(
        worker=spec.worker_id,
        incarnation=new_incarnation(),
        role=Role(spec.role),
        model=spec.model,
        schema=model.schema.hex(),
        endpoint=f"{spec.host}:{port}",
        pid=os.getpid(),
        context_tokens=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        dtype=spec.dtype,
        pool_blocks=spec.engine.pool_blocks,
        role_weight=spec.role_weight,
        block_bytes=model.storage.layout.block_bytes,
    )
