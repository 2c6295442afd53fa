"""Only workers pay for torch: seconds of every start, and memory of every process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["pdserve.cluster.serve", "pdserve.cluster.demo", "pdserve.router.process"]
)
def test_the_supervisor_and_the_router_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
