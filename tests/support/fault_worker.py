"""A worker with fault points: `python -m fault_worker --config-json FILE [--step-s SECONDS]`.

Behind its ready line it takes commands on stdin, one JSON object a line, and answers each on stdout with what
has fired since it was armed:

    {"arm": [{"point": "verified", "action": "signal", "pid": 123, "signal": 9}]}    see fault_points.py
    {"release": true}
    {}
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_points import Fault, FaultPoints
from fault_seams import fault_seams

from pdserve.workers.engine.runner import BatchSpec, ModelRunner, Sampled
from pdserve.workers.process import run_worker
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec


class SlowRunner:
    """A tiny model's steps take as long as a real one's: states last, tokens are sent one by one."""

    def __init__(self, inner: ModelRunner, step_s: float) -> None:
        self._inner = inner
        self._step_s = step_s

    def run(self, batch: BatchSpec) -> Sequence[Sampled]:
        time.sleep(self._step_s)
        return self._inner.run(batch)


class Commands:
    """Reads stdin in a thread; commands are carried out on the worker's event loop, once there is one."""

    def __init__(self, points: FaultPoints) -> None:
        self._points = points

    def listen(self) -> None:
        """Call on the event loop."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="commands", daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(self._carry_out, json.loads(line))

    def _carry_out(self, command: dict[str, Any]) -> None:
        if "arm" in command:
            self._points.arm(Fault(**fault) for fault in command["arm"])
        if "release" in command:
            self._points.release()
        print(json.dumps(self._points.report()), flush=True)


def seams(points: FaultPoints, step_s: float) -> Seams:
    commands, around = Commands(points), fault_seams(points)

    def importers(inner: Any) -> Any:
        commands.listen()  # the worker is being made, on its loop
        return around.importers(inner)

    return dataclasses.replace(around, importers=importers, runner=lambda runner: SlowRunner(runner, step_s))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--step-s", type=float, default=0.0)
    arguments = parser.parse_args()
    spec = WorkerSpec.from_dict(json.loads(Path(arguments.config_json).read_text()))
    run_worker(spec, seams(FaultPoints(), arguments.step_s))


if __name__ == "__main__":
    main()
