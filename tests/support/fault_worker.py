"""A worker that dies at a named lifecycle event: `python -m fault_worker --config-json FILE --die EVENT:N`.

The N-th occurrence counts, from 1. It dies by SIGKILL, inside the event: no clean-up of any kind runs.
"""

import argparse
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from pdserve.core.lifecycle import Lifecycle
from pdserve.workers.process import run_worker
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec


class DieAt:
    """An observer that ends its process."""

    def __init__(self, event: Lifecycle, occurrence: int) -> None:
        self._event = event
        self._left = occurrence

    def __call__(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        if event is self._event:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--die", required=True)
    arguments = parser.parse_args()
    event, _, occurrence = arguments.die.partition(":")
    spec = WorkerSpec.from_dict(json.loads(Path(arguments.config_json).read_text()))
    run_worker(spec, Seams(observer=DieAt(Lifecycle(event), int(occurrence))))


if __name__ == "__main__":
    main()
