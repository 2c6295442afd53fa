"""What a worker last said of itself in a heartbeat, as far as a router can use it."""

import logging
from dataclasses import replace

from pdserve.core.perfmodel import PerfModel
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.proto import worker_pb2
from pdserve.router import wire
from pdserve.router.prefill_traffic import PrefillTraffic

log = logging.getLogger(__name__)


class WorkerReport:
    """Of one start of a worker. Numbers that no worker can mean are left out, and said in the log."""

    def __init__(self, now: float) -> None:
        """`now`: on the router's clock, as all its times."""
        self.load = WorkerLoad()
        self.message = worker_pb2.WorkerLoad()
        """The load as it came, for status pages."""
        self.perf = PerfModel()
        self.traffic = PrefillTraffic()
        self.at = now
        """When `load` came."""
        self.ended = 0
        """Requests that ended since, so that `load` still has their sequences."""

    def hear(self, heartbeat: worker_pb2.WorkerHeartbeat, record: WorkerRecord, now: float) -> WorkerRecord:
        """Take a heartbeat in; returns the record as it is now."""
        load = wire.load_of(heartbeat)
        self.load, self.message, self.at, self.ended = load, heartbeat.load, now, 0
        self.traffic.beat(now, load.prefills, load.prefill_busy_s)
        try:
            self.perf.restore(load.perf_model)
        except ValueError:
            log.warning("worker %s sent an unusable performance model", record.worker)
        weight = heartbeat.load.role_weight
        if not 0.0 <= weight <= 1.0:
            log.warning("worker %s sent an unusable role weight: %s", record.worker, weight)
            weight = record.role_weight
        return replace(record, draining=heartbeat.load.draining, role_weight=weight)
