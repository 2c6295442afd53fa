"""The rung that works everywhere: blocks as frames on one plain socket per pair of workers."""

from pdserve.kvtransfer.transports.tcp.exporter import TcpExporter
from pdserve.kvtransfer.transports.tcp.importer import TcpImporter

__all__ = ["TcpExporter", "TcpImporter"]
