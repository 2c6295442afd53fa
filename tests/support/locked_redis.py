"""A redis that asks for a password, and a TLS front for it."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator

from pdserve.cluster.redis_server import find_program

PASSWORD = "password-of-redis-5f1c"


@contextlib.contextmanager
def locked_redis() -> Iterator[int]:
    """Its port; PASSWORD is what it asks for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # The password goes in by standard input: process arguments are everybody's to read.
    settings = f'port {port}\nbind 127.0.0.1\nsave ""\nappendonly no\nrequirepass {PASSWORD}\n'
    process = subprocess.Popen(
        [find_program(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd="/"
    )
    assert process.stdin is not None
    process.stdin.write(settings)
    process.stdin.close()
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(ConnectionError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            assert time.monotonic() < deadline, "redis does not answer"
            assert process.poll() is None, "redis ended"
            time.sleep(0.01)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def tls_front(port: int, certificate: str, key: str) -> AsyncIterator[int]:
    """The port of a server that speaks TLS and passes everything on to `port`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        for task in (
            asyncio.ensure_future(pump(reader, far_writer)),
            asyncio.ensure_future(pump(far_reader, writer)),
        ):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(attend, "127.0.0.1", 0, ssl=context)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
