"""The rung between GPUs of two processes or hosts: packed blocks over a communicator per pair of workers."""

from pdserve.kvtransfer.transports.nccl.exporter import NcclExporter
from pdserve.kvtransfer.transports.nccl.importer import NcclImporter

__all__ = ["NcclExporter", "NcclImporter"]
