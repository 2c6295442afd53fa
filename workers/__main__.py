"""`python -m pdserve.workers --config-json FILE|-`: one worker as a plain process, no Ray needed."""

import argparse
import json
import sys
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.workers.process import run_worker
from pdserve.workers.spec import WorkerSpec


def main() -> int:
    """Exit status: 0 after a signal, 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(prog="python -m pdserve.workers", description=__doc__)
    parser.add_argument("--config-json", required=True, help="a WorkerSpec as JSON: a file, or - for stdin")
    source = parser.parse_args().config_json
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
        run_worker(WorkerSpec.from_dict(json.loads(text)))
    except (ConfigError, OSError, json.JSONDecodeError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
