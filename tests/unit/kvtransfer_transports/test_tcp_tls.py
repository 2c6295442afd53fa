"""The tcp halves between strangers: nothing lands, and both sides say why, at once."""

import asyncio
import logging
import ssl
from pathlib import Path

import pytest

from pdserve.core.config import SecurityConfig
from pdserve.core.security.cluster_tls import WorkerTls
from pdserve.core.security.dev_certs import make_certificates
from pdserve.core.security.tls import WORKER_NAME
from pdserve.core.types import BlockId, HandoffId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Segment
from pdserve.kvtransfer.transports.tcp import TcpExporter, TcpImporter

LAYOUT = KvLayout(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32")
GRANT = Grant(HandoffId("h"), 1, 0, (Segment(BlockId(0), 1, BlockId(0), 16),))
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ssl.SSLContext | None]:
    """Of servers and of clients; `nameless` has our CA and shows nothing, `client` shows a client's."""
    found: dict[str, ssl.SSLContext | None] = {"plain": None}
    for who in ("ours", "theirs"):
        folder: Path = tmp_path_factory.mktemp(who)
        make_certificates(folder)
        tls = WorkerTls.load(SecurityConfig(tls_dir=str(folder)))
        assert tls is not None
        found |= {f"{who} server": tls.sockets.server, f"{who} client": tls.sockets.client}
        if who == "ours":
            found["nameless"] = ssl.create_default_context(cafile=folder / "ca.pem")
            found["client"] = ssl.create_default_context(cafile=folder / "ca.pem")
            found["client"].load_cert_chain(folder / "client.pem", folder / "client.key")
            # The server's certificate has our CA's signature, and not the workers' name.
            found["router as worker"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            found["router as worker"].load_cert_chain(folder / "server.pem", folder / "server.key")
    return found


@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        ("ours server", "theirs client", "CERTIFICATE_VERIFY_FAILED"),
        ("theirs server", "ours client", "CERTIFICATE_VERIFY_FAILED"),
        ("router as worker", "ours client", WORKER_NAME),
        ("ours server", "nameless", ""),
        ("ours server", "client", ""),
        ("ours server", "plain", ""),
        ("plain", "ours client", ""),
    ],
)
async def test_strangers_exchange_nothing(
    contexts: dict[str, ssl.SSLContext | None],
    server: str,
    client: str,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, target = KvStorage(LAYOUT, 2), KvStorage(LAYOUT, 2)
    target.bytes_view[:] = 0xA5
    exporter = TcpExporter(source, timeout_s=TIMEOUT_S, tls=contexts[server])
    await exporter.start()
    importer = TcpImporter(target, exporter.offer(), timeout_s=TIMEOUT_S, tls=contexts[client])
    try:
        with caplog.at_level(logging.WARNING):
            async with asyncio.timeout(TIMEOUT_S / 2):  # well below its own bound: refused, not run out
                report = await importer.fetch(GRANT)
                while "is refused" not in caplog.text:
                    await asyncio.sleep(0.01)
        assert isinstance(report, Failed)
        assert "lost" in report.reason
        assert says in report.reason
        assert (target.bytes_view == 0xA5).all()
    finally:
        await importer.close()
        await exporter.close()
        source.close()
        target.close()
