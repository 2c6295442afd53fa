"""NCCL between processes that share one GPU: it refuses unless it is told, or takes them for two hosts."""

import os

from pdserve.kvtransfer.gpu.nccl import load_nccl

SINCE = 23007
"""2.30.7 has NCCL_MULTI_RANK_GPU_ENABLE."""


def allow() -> str:
    """For this process, before its first communicator; what was set."""
    name, value = ("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    if load_nccl().version < SINCE:
        name, value = "NCCL_HOSTID", f"pdserve-{os.getpid()}"  # so it goes over sockets
    os.environ[name] = value
    return f"{name}={value}"
