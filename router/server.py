"""The router's servers: Inference, health and reflection over gRPC, and the OpenAI API over HTTP."""

import asyncio
import secrets
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from pdserve.core.channel_options import FRONT_SERVER_OPTIONS, MAX_MESSAGE_BYTES
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.config import ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.core.security.cluster_tls import FrontTls, WorkerTls
from pdserve.core.security.tokens import TokenTable
from pdserve.core.types import Disaggregation
from pdserve.kvtransfer.index.base import LocationIndex
from pdserve.kvtransfer.index.metered import IndexStats
from pdserve.proto import inference_pb2
from pdserve.proto.connections import listen
from pdserve.proto.inference_pb2_grpc import add_InferenceServicer_to_server
from pdserve.router.admission import Admission
from pdserve.router.bookings import Bookings
from pdserve.router.dispatch import Dispatcher
from pdserve.router.gate import AdmissionGate
from pdserve.router.intake import Door, Intake, Tokenizer
from pdserve.router.malformed import RefuseMalformed
from pdserve.router.metered_intake import MeteredIntake
from pdserve.router.openai.serving import openai_server
from pdserve.router.policies.base import Policy
from pdserve.router.policies.hybrid import HybridPolicy
from pdserve.router.service import InferenceService
from pdserve.router.session_pool import MembershipSource, SessionPool
from pdserve.router.token_gate import TokenGate
from pdserve.router.universal import UniversalPrefix

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

STOP_GRACE_S = 2.0
"""Time for running calls once the router stops."""
_LAST_WORDS_S = 1.0
"""Time for the status of those that did not end in it."""


class RouterServer:
    """Composition of one router. Owns its sessions and its ports, not the index or the membership view."""

    def __init__(
        self,
        config: ServeConfig,
        index: LocationIndex,
        membership_view: MembershipSource,
        tokenizers: Mapping[str, Tokenizer],
        admin_endpoint: str = "",
        *,
        policy: Policy | None = None,
        index_stats: IndexStats | None = None,
        clock: Clock | None = None,
        own_token: str = "",
    ) -> None:
        """`tokenizers` by model name; `admin_endpoint` is shown in GetStatus, empty without a supervisor.

        `index_stats` are the figures of a metered `index`, for GetStatus. `own_token`, the supervisor's, is
        accepted beside those of the tokens file. Raises ConfigError for security files that are wrong.
        """
        clock = clock or MonotonicClock()
        self._config = config
        security = config.security
        self._front_tls = FrontTls.load(security)
        worker_tls = WorkerTls.load(security)
        self.tokens = None if security.tokens_file is None else TokenTable.load(security.tokens_file)
        """None: callers need none."""
        if self.tokens is not None and own_token:
            self.tokens = self.tokens.with_token("supervisor", own_token)
        self.bookings = Bookings()
        self.gate = AdmissionGate(Admission(config.router.max_in_flight, config.router.max_queue), clock)
        self.pool = SessionPool(
            membership_view,
            self.bookings,
            router=f"router-{secrets.token_hex(4)}",
            config=config.session,
            engine=config.engine,
            clock=clock,
            export_share=config.handoff.export_share,
            tls=None if worker_tls is None else worker_tls.client,
        )
        dispatcher = Dispatcher(
            self.pool,
            policy or HybridPolicy(Disaggregation(config.router.disaggregation)),
            self.bookings,
            UniversalPrefix(config.router.universal_share),
            index,
            index_timeout_s=config.index.timeout_s,
            buffer_tokens=config.session.client_buffer_tokens,
            clock=clock,
        )
        self.intake = Intake(
            Door(tokenizers, config.router.max_prompt_bytes, config.engine.headroom_tokens),
            self.gate,
            dispatcher,
            self.pool,
            index_stats=index_stats,
            admin_endpoint=admin_endpoint,
            clock=clock,
        )
        self.metered = MeteredIntake(self.intake, clock)
        self._http = openai_server(
            self.metered,
            tokenizers,
            config.router,
            grace_s=STOP_GRACE_S + _LAST_WORDS_S,
            tls=None if self._front_tls is None else self._front_tls.server,
            tokens=self.tokens,
        )
        self._health = health_aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._serving: bool | None = None
        self._news: set[asyncio.Task[None]] = set()
        self._port: int | None = None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        if self._port is None:
            raise RuntimeError("the router has not been started")
        return self._port

    @property
    def http_port(self) -> int | None:
        """The port of the HTTP API; None: it is not served."""
        return None if self._http is None else self._http.port

    async def start(self) -> None:
        """Listen, and connect to the workers. Raises ConfigError when a port is taken."""
        # Above the limit, so that a prompt somewhat too long is refused by us, with both numbers.
        longest = max(MAX_MESSAGE_BYTES, 2 * self._config.router.max_prompt_bytes)
        limits = {"grpc.max_receive_message_length": longest, "grpc.so_reuseport": 0}
        options = dict(FRONT_SERVER_OPTIONS) | limits
        interceptors: list[grpc.aio.ServerInterceptor] = [RefuseMalformed(INFERENCE)]
        if self.tokens is not None:
            interceptors.insert(0, TokenGate(self.tokens))
        server = grpc.aio.server(interceptors=interceptors, options=list(options.items()))
        add_InferenceServicer_to_server(InferenceService(self.metered), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (INFERENCE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        address = f"{self._config.router.host}:{self._config.router.grpc_port}"
        if self._http is not None:
            await self._http.start()  # first: a gRPC server that never started cannot give its port back
        try:
            self._port = listen(server, address, None if self._front_tls is None else self._front_tls.server)
        except RuntimeError as error:
            if self._http is not None:
                self._http.close()
                await self._http.stopped()
            raise ConfigError(
                f"cannot listen on {address} ({error}): choose another router.grpc_port"
            ) from error
        self._announce(False)
        await server.start()
        self._server = server
        self.pool.start(lambda: self._announce(self.intake.servable()))

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Take no new calls; what still runs after `grace_s` fails as retriable. Idempotent."""
        await self._health.enter_graceful_shutdown()
        server, self._server = self._server, None
        if server is not None:
            stopping = asyncio.create_task(self._stop_servers(server, grace_s + _LAST_WORDS_S))
            await asyncio.wait([stopping], timeout=grace_s)
            await self.pool.stop()
            await stopping
        await asyncio.gather(*self._news)

    async def _stop_servers(self, server: grpc.aio.Server, grace_s: float) -> None:
        if self._http is not None:
            self._http.close()
        await server.stop(grace_s)
        if self._http is not None:
            await self._http.stopped()

    def _announce(self, serving: bool) -> None:
        """Tell health watchers, when it changed."""
        if serving is self._serving:
            return
        self._serving = serving
        status = health_pb2.HealthCheckResponse
        news = status.SERVING if serving else status.NOT_SERVING
        task = asyncio.create_task(self._publish(news))
        self._news.add(task)
        task.add_done_callback(self._news.discard)

    async def _publish(self, status: int) -> None:
        for name in ("", INFERENCE):
            await self._health.set(name, status)
