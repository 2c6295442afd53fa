"""A cluster of plain processes, without Ray: redis, one router, any workers. Ends with the `with` block."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc

from pdserve.cluster.redis_server import start_redis
from pdserve.core.config import (
    EngineConfig,
    HandoffConfig,
    IndexConfig,
    RouterConfig,
    ServeConfig,
    SessionConfig,
)
from pdserve.core.types import Role
from pdserve.proto import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from pdserve.router.process import RouterSpec
from pdserve.workers.spec import WorkerSpec

START_TIMEOUT_S = 90.0
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """One child and what it said of itself when it was ready."""

    popen: "subprocess.Popen[str]"
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def wait_ready(self) -> dict[str, Any]:
        """The first line that the child prints, as JSON."""
        self.ready = self.next_line(START_TIMEOUT_S)
        return self.ready

    def next_line(self, timeout_s: float) -> dict[str, Any]:
        """The child's next line. Raises AssertionError with its log when it says nothing in time."""
        stdout = self.popen.stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], timeout_s)
        line = stdout.readline() if readable else ""
        assert line, f"the process said nothing:\n{self.log.read_text()[-4000:]}"
        return dict(json.loads(line))

    def ask(self, command: dict[str, Any], timeout_s: float = 20.0) -> dict[str, Any]:
        """Send one line of JSON to a child that takes such, and return its answer."""
        stdin = self.popen.stdin
        assert stdin is not None
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        return self.next_line(timeout_s)

    def kill(self) -> None:
        """SIGKILL and wait."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """SIGTERM, then SIGKILL after a grace; returns the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.popen.wait(15)
            self.popen.kill()
        return self.popen.wait()


class BareCluster:
    """Processes by name; workers are called like their role and number, the router `router`."""

    def __init__(
        self,
        *,
        model: str = "smollm2-135m",
        dtype: str = "float32",
        engine: EngineConfig | None = None,
        handoff: HandoffConfig | None = None,
        session: SessionConfig | None = None,
        index: IndexConfig | None = None,
    ) -> None:
        """`index` without a redis_url: that is the cluster's own."""
        self.model = model
        self.dtype = dtype
        self.engine = engine or EngineConfig(pool_blocks=512, chunk_tokens=256)
        self.handoff = handoff or HandoffConfig()
        self.session = session or SessionConfig()
        self.processes: dict[str, Process] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="pdserve-test-"))
        self.redis = start_redis(None)
        self.index = dataclasses.replace(index or IndexConfig(timeout_s=1.0), redis_url=self.redis.url)
        self.target = ""

    def start_worker(
        self,
        name: str,
        role: Role,
        *,
        module: str = "pdserve.workers",
        arguments: Sequence[str] = (),
        **changes: Any,
    ) -> Process:
        """Start a worker and do not wait for it. `changes` replace fields of its spec."""
        spec = WorkerSpec(
            worker=name,
            role=str(role),
            model=self.model,
            dtype=self.dtype,
            engine=self.engine,
            handoff=self.handoff,
            session=self.session,
            index=self.index,
        )
        spec = dataclasses.replace(spec, **changes)
        return self._spawn(name, module, spec.to_dict(), arguments)

    def start_router(self) -> str:
        """Start the router and wait for it; returns host:port."""
        self.spawn_router()
        return self.await_router()

    def spawn_router(self) -> None:
        """Start the router and do not wait for it."""
        config = ServeConfig(
            model=self.model,
            dtype=self.dtype,
            engine=self.engine,
            handoff=self.handoff,
            session=self.session,
            index=self.index,
            router=RouterConfig(grpc_port=0, disaggregation="always"),
        )
        self._spawn("router", "pdserve.router", RouterSpec(config=config).to_dict(), ())

    def await_router(self) -> str:
        """Wait until the router listens; returns host:port."""
        self.target = self.processes["router"].wait_ready()["grpc"]
        return self.target

    def wait_ready(self, *names: str) -> None:
        """Wait until the router sees these workers as ready, each under its latest incarnation."""
        for name in names:
            process = self.processes[name]
            if not process.ready:
                process.wait_ready()
        wanted = {(name, self.processes[name].ready["incarnation"]) for name in names}
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            seen = {(w.worker, w.incarnation) for w in self.status().workers if w.state == "ready"}
            if wanted <= seen:
                return
            time.sleep(0.05)
        raise AssertionError(f"the router does not see {wanted}: {self.status()}")

    def status(self) -> inference_pb2.GetStatusResponse:
        with grpc.insecure_channel(self.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            return stub.GetStatus(inference_pb2.GetStatusRequest(), timeout=20)

    def inspect(self, name: str) -> worker_pb2.InspectResponse:
        """A worker's own account of itself."""
        with grpc.insecure_channel(self.processes[name].ready["endpoint"]) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return stub.Inspect(worker_pb2.InspectRequest(), timeout=20)

    def assert_settled(self, *names: str, timeout_s: float = 20.0) -> None:
        """Every block of these workers is free or cached, nothing is promised or in flight, books agree."""
        deadline = time.monotonic() + timeout_s
        while True:
            reports = {name: self.inspect(name) for name in names}
            unsettled = {name: text for name, report in reports.items() if (text := _unsettled(report))}
            if not unsettled:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"not settled after {timeout_s} s: {unsettled}")
            time.sleep(0.05)

    def log_of(self, name: str) -> str:
        return self.processes[name].log.read_text()

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.stop()
        self.redis.stop()

    def _spawn(self, name: str, module: str, spec: dict[str, Any], arguments: Sequence[str]) -> Process:
        log = self.folder / f"{name}.{len(list(self.folder.iterdir()))}.log"
        configuration = log.with_suffix(".json")
        configuration.write_text(json.dumps(spec))
        handle: IO[str] = log.open("w")
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY / 'tests' / 'support'}"}
        popen = subprocess.Popen(
            [sys.executable, "-m", module, "--config-json", str(configuration), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=handle,
            text=True,
            cwd=self.folder,
            env=environment,
        )
        handle.close()
        self.processes[name] = Process(popen, log)
        return self.processes[name]


def _unsettled(report: worker_pb2.InspectResponse) -> str:
    """Why a worker is not at rest; empty when it is."""
    if report.integrity_error:
        return report.integrity_error
    blocks = report.status.blocks
    busy = {
        name: getattr(blocks, name) for name in ("held", "reserved", "loading", "quarantined", "promised")
    }
    busy |= {
        "handoffs": report.load.handoffs,
        "in_flight": report.load.in_flight,
        "running": report.load.running,
    }
    left = {name: count for name, count in busy.items() if count}
    if blocks.free + blocks.cached != blocks.total and not left:
        return f"{blocks.free} free + {blocks.cached} cached of {blocks.total}"
    return str(left) if left else ""


@contextlib.contextmanager
def bare_cluster(
    workers: dict[str, Role], *, worker_changes: dict[str, dict[str, Any]] | None = None, **settings: Any
) -> Iterator[BareCluster]:
    """Workers by name, and a router that sees them all."""
    cluster = BareCluster(**settings)
    try:
        for name, role in workers.items():
            cluster.start_worker(name, role, **(worker_changes or {}).get(name, {}))
        cluster.start_router()
        cluster.wait_ready(*workers)
        yield cluster
    finally:
        cluster.close()
