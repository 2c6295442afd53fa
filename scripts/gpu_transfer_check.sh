#!/bin/sh
# KV transfers on a real GPU: the contract suite, SIGKILL in mid-transfer, the kernel. Fails without a GPU.
# Usage: scripts/gpu_transfer_check.sh [PYTHON]; needs pytest, pytest-asyncio, torch with CUDA, cupy, NCCL.
set -eu
cd "$(dirname "$0")/.."
python="${1:-python3}"
echo "# GPU transfer check, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU here: nvidia-smi is not on the PATH" >&2; exit 1; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
PYTHONPATH="src:tests/support" "$python" - <<'END'
import platform

import cupy
import torch

from pdserve.kvtransfer.gpu.cuda import open_gpu
from pdserve.kvtransfer.gpu.nccl import load_nccl

gpu = open_gpu(0)
print(f"python {platform.python_version()}, torch {torch.__version__}, cupy {cupy.__version__}, "
      f"NCCL {load_nccl().version}, GPU {gpu.bus_id}")
import nccl_on_one_gpu

print("two NCCL ranks on it by", nccl_on_one_gpu.allow())
END
exec "$python" -m pytest -v --no-header -p no:cacheprovider -m "full or not full" \
  tests/unit/kvtransfer_gpu tests/gpu tests/contract/test_transport_contract.py
