"""Which transport a pair uses: the best rung that both allow and that reaches from here."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.security.tls import SocketTls
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Exporter, Importer, Offer
from pdserve.kvtransfer.transports.cuda_ipc import CudaIpcExporter, CudaIpcImporter
from pdserve.kvtransfer.transports.inproc import InprocExporter, InprocImporter, exporter_here
from pdserve.kvtransfer.transports.mapped_pool import HostIdentity, reachable
from pdserve.kvtransfer.transports.nccl import NcclExporter, NcclImporter
from pdserve.kvtransfer.transports.shm import ShmExporter, ShmImporter
from pdserve.kvtransfer.transports.tcp import TcpExporter, TcpImporter

_log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0

_OF_HOST_MEMORY = frozenset({"inproc", "shm"})
_OF_GPU_MEMORY = frozenset({"cuda_ipc", "nccl"})
_MAPPED = frozenset({"cuda_ipc", "shm"})
"""Through a memfd of P's, so only between processes of one host and user."""
_NOT_ENCRYPTED = "NCCL does not encrypt, and workers show certificates here (security.tls_dir)"


class Obstacle(NamedTuple):
    """Why a pair cannot use a rung. `expected`: for where these two run it was never meant to work."""

    reason: str
    expected: bool


class Rung(NamedTuple):
    """One step of the ladder, for one pair. Without an obstacle there is an offer."""

    transport: str
    offer: Offer | None
    obstacle: Obstacle | None


def ordered(allowed: Sequence[str]) -> tuple[str, ...]:
    """`allowed` best rung first; ConfigError for a name that is no rung."""
    if unknown := set(allowed) - set(TRANSPORT_LADDER):
        raise ConfigError(f"unknown transports {sorted(unknown)}; choose from {list(TRANSPORT_LADDER)}")
    return tuple(rung for rung in TRANSPORT_LADDER if rung in allowed)


def survey(offers: Sequence[Offer], allowed: Sequence[str], storage: KvStorage) -> Iterator[Rung]:
    """The allowed rungs, best first, each with what stands in the way of copying to `storage` over it.

    What tcp reaches shows only when it connects, so its offer has no obstacle.
    """
    by_name = {offer.transport: offer for offer in offers}
    for transport in ordered(allowed):
        offer = by_name.get(transport)
        yield Rung(transport, offer, _obstacle(transport, offer, storage))


def choose(offers: Sequence[Offer], allowed: Sequence[str], storage: KvStorage) -> Offer | None:
    """The offer of the best rung without an obstacle; None if there is none."""
    usable = (rung.offer for rung in survey(offers, allowed, storage) if rung.obstacle is None)
    return next(usable, None)


def _obstacle(transport: str, offer: Offer | None, storage: KvStorage) -> Obstacle | None:
    if transport in (_OF_HOST_MEMORY if storage.blocks_on_gpu is not None else _OF_GPU_MEMORY):
        return Obstacle(f"this worker's pool is on {storage.device}", expected=True)
    if offer is None:
        return Obstacle("it is not offered", expected=transport == "inproc")
    if offer.parameters.get("layout") != storage.layout.fingerprint().hex():
        return Obstacle("the offered pool has another block layout", expected=False)
    if transport == "inproc" and exporter_here(offer) is None:
        return Obstacle("the offered pool is in another process", expected=True)
    return _obstacle_to_mapping(transport, offer) if transport in _MAPPED else None


def _obstacle_to_mapping(transport: str, offer: Offer) -> Obstacle | None:
    if offer.parameters.get("boot_id") != HostIdentity.mine().boot_id:
        return Obstacle("the offered pool is on another host", expected=True)
    if not reachable(offer):
        return Obstacle(
            "the offered pool cannot be mapped: both ends need one user and one pid namespace", expected=False
        )
    if transport == "cuda_ipc" and offer.parameters.get("pid") == str(os.getpid()):
        return Obstacle("the offered pool is in this process, and CUDA maps only others' memory", True)
    return None


def make_importer(
    offer: Offer,
    storage: KvStorage,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    tls: SocketTls | None = None,
) -> Importer:
    """D's half for an offer. Raises Unavailable where it cannot be made (any more)."""
    if offer.transport == "inproc":
        return InprocImporter(storage, offer, timeout_s=timeout_s)
    if offer.transport == "cuda_ipc":
        return CudaIpcImporter(storage, offer, timeout_s=timeout_s)
    if offer.transport == "nccl":
        if tls is not None:
            raise Unavailable(_NOT_ENCRYPTED)
        return NcclImporter(storage, offer, timeout_s=timeout_s)
    if offer.transport == "shm":
        return ShmImporter(storage, offer, timeout_s=timeout_s)
    if offer.transport == "tcp":
        return TcpImporter(storage, offer, timeout_s=timeout_s, tls=None if tls is None else tls.client)
    raise Unavailable(f"no transport {offer.transport!r} here; choose from {list(TRANSPORT_LADDER)}")


def make_exporters(
    storage: KvStorage,
    allowed: Sequence[str],
    *,
    host: str = "127.0.0.1",
    advertise: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    tls: SocketTls | None = None,
) -> tuple[Exporter, ...]:
    """P's halves of all allowed rungs that `storage` can serve, best first, not started yet.

    `host` is where tcp listens, `advertise` the address that readers use, where it is another; with `tls` it
    is encrypted and both ends show certificates. A rung that this machine does not have is a line in the log.
    """
    server = None if tls is None else tls.server
    makers: dict[str, Callable[[], Exporter]] = {
        "tcp": lambda: TcpExporter(storage, host, advertise=advertise, timeout_s=timeout_s, tls=server)
    }
    if storage.on_host:
        makers |= {"inproc": lambda: InprocExporter(storage), "shm": lambda: ShmExporter(storage)}
    else:
        makers |= {
            "cuda_ipc": lambda: CudaIpcExporter(storage),
            "nccl": lambda: _nccl_exporter(storage, host, advertise, timeout_s, tls),
        }
    exporters: list[Exporter] = []
    for rung in ordered(allowed):
        try:
            if rung in makers:
                exporters.append(makers[rung]())
        except Unavailable as error:
            _log.warning("kv transfer: %s is not offered: %s", rung, error.message)
    return tuple(exporters)


def _nccl_exporter(
    storage: KvStorage, host: str, advertise: str | None, timeout_s: float, tls: SocketTls | None
) -> NcclExporter:
    if tls is not None:
        raise Unavailable(_NOT_ENCRYPTED)
    return NcclExporter(storage, host, advertise=advertise, timeout_s=timeout_s)
