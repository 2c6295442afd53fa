"""Prometheus sees what each worker has fetched over which transport, and where pairs fell down the ladder."""

from types import SimpleNamespace
from typing import cast

from prometheus_client import CollectorRegistry

from pdserve.proto import inference_pb2 as pb
from pdserve.router.intake import Intake
from pdserve.router.worker_metrics import WorkerMetrics


def registry(*workers: pb.WorkerStatus) -> CollectorRegistry:
    status = pb.GetStatusResponse(workers=workers)
    made = CollectorRegistry()
    made.register(WorkerMetrics(cast(Intake, SimpleNamespace(status=lambda: status))))
    return made


def test_transfers_are_exported_per_worker_and_transport() -> None:
    shm = pb.TransportUse(transport="shm", chunks=4, bytes=6_000, seconds=1.5, pairs=2)
    tcp = pb.TransportUse(transport="tcp", pairs=1, falls=3)
    seen = registry(pb.WorkerStatus(worker="decode-0", transports=[shm, tcp]), pb.WorkerStatus(worker="p"))

    def value(name: str, transport: str) -> float | None:
        return seen.get_sample_value(f"pdserve_{name}", {"worker": "decode-0", "transport": transport})

    assert value("kv_transfer_bytes_total", "shm") == 6_000
    assert value("kv_transfer_seconds_total", "shm") == 1.5
    assert value("kv_transfer_bytes_per_second", "shm") == 4_000
    assert value("kv_transfer_bytes_per_second", "tcp") is None, "nothing has moved over it"
    assert (value("kv_transfer_pairs", "shm"), value("kv_transfer_pairs", "tcp")) == (2, 1)
    assert (value("kv_transfer_rung_falls_total", "shm"), value("kv_transfer_rung_falls_total", "tcp")) == (
        0,
        3,
    )


def test_usage_leaves_out_what_is_free_or_merely_cached() -> None:
    blocks = pb.BlockCounts(total=8, free=3, cached=1, held=2, loading=1, quarantined=1)
    seen = registry(pb.WorkerStatus(worker="a", running=2, waiting=1, blocks=blocks))
    assert seen.get_sample_value("pdserve_kv_cache_usage_ratio", {"worker": "a"}) == 0.5
    assert seen.get_sample_value("pdserve_num_requests_running", {"worker": "a"}) == 2
    assert seen.get_sample_value("pdserve_num_requests_waiting", {"worker": "a"}) == 1
