"""`python -m pdserve.router --config-json FILE|-`: one router as a plain process."""

import argparse
import json
import logging
import sys
from pathlib import Path

import uvloop

from pdserve.core.errors import ConfigError
from pdserve.router.process import RouterSpec, run_router


def main() -> int:
    """Exit status: 0 after a signal, 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(prog="python -m pdserve.router", description=__doc__)
    parser.add_argument("--config-json", required=True, help="a RouterSpec as JSON: a file, or - for stdin")
    source = parser.parse_args().config_json
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
        spec = RouterSpec.from_dict(json.loads(text))
        uvloop.run(run_router(spec))
    except (ConfigError, OSError, json.JSONDecodeError) as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
