"""The bytes of the tcp transport: four records, little-endian, each behind its own magic.

    D → P   Hello    version, the token from P's offer, a random id of the reader
    P → D   Welcome  version, accepted or not
    D → P   Claim    tag, epoch, seq, handoff id: "I am the one whom that grant is for, send it here"
    P → D   Frame    tag, epoch, seq, status, payload size; the payload: whole blocks in the grant's order,
                     or, when the status is not 0, the reason as text

A tag is the reader's number for one claim on one connection; P repeats it. P sends a payload only for a claim
that meets a grant which came over the handoff stream.
"""

import socket
import struct
from typing import NamedTuple

from pdserve.core.types import HandoffId
from pdserve.kvtransfer.transports.tcp.stream import Stream

VERSION = 1
TOKEN_BYTES = 16
MAX_HANDOFF_BYTES = 512
MAX_REASON_BYTES = 1024

_HELLO = struct.Struct("<4sH16s16s")
_WELCOME = struct.Struct("<4sHB")
_CLAIM = struct.Struct("<4sQQQH")
_FRAME = struct.Struct("<4sQQQBQ")
HELLO_BYTES, WELCOME_BYTES, CLAIM_BYTES, FRAME_BYTES = _HELLO.size, _WELCOME.size, _CLAIM.size, _FRAME.size


class WireError(ConnectionError):
    """The peer does not speak this protocol, or no longer; the connection cannot be used further."""


class Hello(NamedTuple):
    token: bytes
    reader: bytes

    def pack(self) -> bytes:
        return _HELLO.pack(b"PDKV", VERSION, self.token, self.reader)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "Hello":
        magic, version, token, reader = _HELLO.unpack(data)
        if magic != b"PDKV" or version != VERSION:
            raise WireError(f"expected a hello of version {VERSION}, got {magic!r} version {version}")
        return cls(token, reader)


class Welcome(NamedTuple):
    accepted: bool

    def pack(self) -> bytes:
        return _WELCOME.pack(b"PDKW", VERSION, self.accepted)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "Welcome":
        magic, version, accepted = _WELCOME.unpack(data)
        if magic != b"PDKW" or version != VERSION:
            raise WireError(f"expected a welcome of version {VERSION}, got {magic!r} version {version}")
        return cls(accepted == 1)


class Claim(NamedTuple):
    tag: int
    handoff: HandoffId
    epoch: int
    seq: int

    def pack(self) -> bytes:
        """Raises WireError where the handoff id is too long to send."""
        handoff = self.handoff.encode()
        if len(handoff) > MAX_HANDOFF_BYTES:
            raise WireError(f"a handoff id may have {MAX_HANDOFF_BYTES} bytes, got {len(handoff)}")
        return _CLAIM.pack(b"PDKC", self.tag, self.epoch, self.seq, len(handoff)) + handoff


class FrameHeader(NamedTuple):
    tag: int
    epoch: int
    seq: int
    failed: bool
    num_bytes: int

    def pack(self) -> bytes:
        return _FRAME.pack(b"PDKF", self.tag, self.epoch, self.seq, self.failed, self.num_bytes)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "FrameHeader":
        magic, tag, epoch, seq, status, num_bytes = _FRAME.unpack(data)
        if magic != b"PDKF" or status > 1:
            raise WireError(f"expected a frame, got {bytes(data[:8])!r}")
        return cls(tag, epoch, seq, status == 1, num_bytes)


async def receive_claim(stream: Stream) -> Claim:
    """The next claim on `stream`; ConnectionError when there is none any more."""
    head = bytearray(CLAIM_BYTES)
    await receive_exactly(stream, memoryview(head))
    magic, tag, epoch, seq, size = _CLAIM.unpack(head)
    if magic != b"PDKC" or size > MAX_HANDOFF_BYTES:
        raise WireError(f"expected a claim, got {bytes(head[:8])!r}")
    handoff = bytearray(size)
    await receive_exactly(stream, memoryview(handoff))
    try:
        return Claim(tag, HandoffId(handoff.decode()), epoch, seq)
    except UnicodeDecodeError as error:
        raise WireError(f"a handoff id is no UTF-8: {error}") from error


async def receive_exactly(stream: Stream, view: memoryview) -> None:
    """Fill `view` from `stream`; ConnectionError where the peer ends before that."""
    while len(view):
        received = await stream.receive(view)
        if not received:
            raise ConnectionError("the peer closed the connection")
        view = view[received:]


def tune(sock: socket.socket, timeout_s: float) -> None:
    """No delay for small records, and an end for connections whose peer vanished.

    Buffer sizes are left to the kernel: it tunes them up to megabytes, a fixed size is capped far lower on
    most hosts.
    """
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))


def peer_of(sock: socket.socket) -> str:
    """host:port of the other end, for messages."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "an address that is gone"
    return f"{host}:{port}"
