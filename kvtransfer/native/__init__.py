"""The inner loops of a transfer, copies of scattered blocks and their digests, in C++ built here."""

from pdserve.kvtransfer.native.kernel import Kernel, load_kernel

__all__ = ["Kernel", "load_kernel"]
