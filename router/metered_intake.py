"""The intake, measured from outside: counts and times of every request, whatever it came over."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdserve.core.clock import Clock
from pdserve.core.errors import Cancelled, InvalidRequest, Overloaded, PdserveError, from_foreign
from pdserve.core.metrics import NAMESPACE, Metric
from pdserve.proto import inference_pb2
from pdserve.router.intake import Intake, OnEnd
from pdserve.router.worker_metrics import WorkerMetrics

_LONG: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_SHORT: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_RATIOS: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2, 5, 10)


class RequestMetrics:
    """The instruments of one router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: Metric, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(
                name, text, namespace=NAMESPACE, registry=registry, buckets=tuple(map(float, buckets))
            )

        def counter(name: Metric, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=NAMESPACE, registry=registry)

        self.ended = counter(Metric.REQUESTS, "Ended requests by HTTP status.", "code")
        self.rejected = counter(Metric.REQUESTS_REJECTED, "Requests that never ran.", "reason")
        self.in_flight = Gauge(
            Metric.IN_FLIGHT,
            "Requests that have arrived and not ended.",
            namespace=NAMESPACE,
            registry=registry,
        )
        self.ttft = histogram(Metric.TIME_TO_FIRST_TOKEN, "Arrival to the first chunk.", _LONG)
        self.itl = histogram(Metric.INTER_TOKEN_LATENCY, "Between chunks of one choice.", _SHORT)
        self.e2e = histogram(Metric.E2E_LATENCY, "Arrival to the end.", _LONG)
        self.queue = histogram(Metric.QUEUE_TIME, "Waiting for admission.", _LONG)
        self.prediction_error = Histogram(
            Metric.PREFILL_PREDICTION_ERROR,
            "Relative error of the predicted time to the first token.",
            ("path",),
            namespace=NAMESPACE,
            registry=registry,
            buckets=tuple(map(float, _RATIOS)),
        )
        self.prompt_tokens = counter(Metric.PROMPT_TOKENS, "Prompt tokens of ended requests.")
        self.cached_tokens = counter(Metric.CACHED_PROMPT_TOKENS, "Prompt tokens that nobody computed.")
        self.generated_tokens = counter(Metric.GENERATED_TOKENS, "Tokens sent to clients.")

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count errors of the block as requests that were refused before the intake saw them."""
        try:
            yield
        except Exception as error:
            self.fail(from_foreign(error), begun=False)
            raise

    def judge(self, route: inference_pb2.Route) -> None:
        """Compare what was expected of the way that was taken; of one with detours nothing was expected."""
        local = route.prefill_worker == route.decode_worker
        path, field = ("local", "predicted_local") if local else ("handoff", "predicted_handoff")
        if not route.HasField(field) or route.candidates_tried or route.measured_s <= 0.0:
            return
        predicted: inference_pb2.PrefillCost = getattr(route, field)
        error = abs(predicted.seconds - route.measured_s) / route.measured_s
        self.prediction_error.labels(path).observe(error)

    def fail(self, error: PdserveError, begun: bool) -> None:
        """Count a request that did not end well; `begun`: something had been generated for it."""
        self.ended.labels(str(error.http_status)).inc()
        if not begun and not isinstance(error, Cancelled):
            known = isinstance(error, InvalidRequest | Overloaded)
            self.rejected.labels(type(error).__name__ if known else "Unavailable").inc()


class MeteredIntake:
    """An Intake with the same calls."""

    def __init__(self, inner: Intake, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self.metrics = RequestMetrics(self.registry)
        self.registry.register(WorkerMetrics(inner))
        self._inner = inner
        self._clock = clock
        # The same object for those that are not measured.
        self.tokenize = inner.tokenize
        self.models = inner.models
        self.status = inner.status
        self.servable = inner.servable

    async def generate(
        self, request: inference_pb2.GenerateRequest, remaining_s: float | None, on_end: OnEnd
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        """As Intake.generate."""
        metrics, arrived = self.metrics, self._clock.now()
        latest: dict[int, float] = {}
        metrics.in_flight.inc()
        try:
            async with aclosing(self._inner.generate(request, remaining_s, on_end)) as chunks:
                async for chunk in chunks:
                    self._observe(chunk, arrived, latest)
                    yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            metrics.fail(Cancelled("the client left"), begun=bool(latest))
            raise
        except Exception as error:
            metrics.fail(from_foreign(error), begun=bool(latest))
            raise
        else:
            metrics.ended.labels("200").inc()
            metrics.e2e.observe(self._clock.now() - arrived)
        finally:
            metrics.in_flight.dec()

    def _observe(self, chunk: inference_pb2.GenerateChunk, arrived: float, latest: dict[int, float]) -> None:
        metrics, now = self.metrics, self._clock.now()
        previous = latest.get(chunk.choice)
        if previous is not None:
            metrics.itl.observe(now - previous)
        elif not latest:
            metrics.ttft.observe(now - arrived)
            metrics.queue.observe(chunk.ledger.queue)
            metrics.judge(chunk.route)
        latest[chunk.choice] = now
        if chunk.finish_reason:
            metrics.generated_tokens.inc(chunk.usage.completion_tokens)
            if chunk.choice == 0:
                metrics.prompt_tokens.inc(chunk.usage.prompt_tokens)
                metrics.cached_tokens.inc(chunk.usage.cached_tokens)
