"""What the workers last said of themselves, as Prometheus reads it."""

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from pdserve.core.metrics import NAMESPACE, Metric
from pdserve.proto import inference_pb2
from pdserve.router.intake import Intake

_BLOCK_STATES: Final = ("free", "held", "reserved", "cached", "loading", "quarantined")
_USED_STATES: Final = ("held", "reserved", "loading", "quarantined")


class WorkerMetrics(Collector):
    """Read when somebody asks, from the heartbeats of the workers that this router is connected to.

    Totals are the worker's own: they begin at zero with each start of it, as counters do.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def collect(self) -> Iterator[Family]:
        workers = self._intake.status().workers
        yield from _load(workers)
        yield from _transports(workers)

    def describe(self) -> Iterable[Family]:
        """Nothing: without it the registry would collect once before the router has started."""
        return ()


def _load(workers: Iterable[inference_pb2.WorkerStatus]) -> Iterator[Family]:
    running = _gauge(
        Metric.WORKER_RUNNING, "Sequences in the worker's batch, as of its last heartbeat.", "worker"
    )
    waiting = _gauge(
        Metric.WORKER_WAITING, "Sequences that wait at the worker, as of its last heartbeat.", "worker"
    )
    usage = _gauge(Metric.KV_USAGE, "Blocks in use, of all, as of the last heartbeat.", "worker")
    blocks = _gauge(Metric.KV_BLOCKS, "Blocks by state, as of the last heartbeat.", "worker", "state")
    for worker in workers:
        running.add_metric([worker.worker], worker.running)
        waiting.add_metric([worker.worker], worker.waiting)
        used = sum(getattr(worker.blocks, state) for state in _USED_STATES)
        usage.add_metric([worker.worker], used / worker.blocks.total if worker.blocks.total else 0.0)
        for state in _BLOCK_STATES:
            blocks.add_metric([worker.worker, state], getattr(worker.blocks, state))
    yield from (running, waiting, usage, blocks)


def _transports(workers: Iterable[inference_pb2.WorkerStatus]) -> Iterator[Family]:
    names = ("worker", "transport")
    num_bytes = _counter(Metric.KV_TRANSFER_BYTES, "KV that the worker has fetched.", *names)
    seconds = _counter(Metric.KV_TRANSFER_SECONDS, "Time in those copies, summed; they may overlap.", *names)
    rate = _gauge(Metric.KV_TRANSFER_RATE, "Mean rate of one copy since the worker's start.", *names)
    pairs = _gauge(Metric.KV_TRANSFER_PAIRS, "Workers that it fetches from over the transport.", *names)
    falls = _counter(
        Metric.KV_TRANSFER_FALLS, "Times that a pair came down to the transport from a better one.", *names
    )
    for worker in workers:
        for use in worker.transports:
            labels = [worker.worker, use.transport]
            num_bytes.add_metric(labels, use.bytes)
            seconds.add_metric(labels, use.seconds)
            if use.seconds > 0:
                rate.add_metric(labels, use.bytes / use.seconds)
            pairs.add_metric(labels, use.pairs)
            falls.add_metric(labels, use.falls)
    yield from (num_bytes, seconds, rate, pairs, falls)


def _gauge(name: Metric, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{NAMESPACE}_{name}", text, labels=labels)


def _counter(name: Metric, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"{NAMESPACE}_{name}", text, labels=labels)
