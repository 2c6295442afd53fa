"""The bytes of the tcp transport: five records, little-endian, each behind its own magic.

    D → P   Hello    version, the token from P's offer, a random id of the reader
    P → D   Welcome  version, accepted or not
    D → P   Claim    tag, epoch, seq, part, parts, handoff id: "I am the one whom that grant is for, send this
                     part of it here"
    P → D   Frame    tag, epoch, seq, payload size; the payload: whole blocks in the grant's order, or none
    P → D   Verdict  after each frame: nothing, if what was sent is what was granted, else the reason as text

A tag is the reader's number for one claim on one connection; P repeats it. P sends a payload only for a claim
that meets a grant which came over the handoff stream. The verdict follows the payload because only then has P
read its blocks for the last time: bytes without a good one are not to be used.
"""

import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from pdserve.core.types import HandoffId

VERSION = 2
TOKEN_BYTES = 16
MAX_HANDOFF_BYTES = 512
MAX_REASON_BYTES = 1024
MAX_PARTS = 4

_HELLO = struct.Struct("<4sH16s16s")
_WELCOME = struct.Struct("<4sHB")
_CLAIM = struct.Struct("<4sQQQBBH")
_FRAME = struct.Struct("<4sQQQQ")
_VERDICT = struct.Struct("<4sH")
HELLO_BYTES, WELCOME_BYTES, CLAIM_BYTES = _HELLO.size, _WELCOME.size, _CLAIM.size
FRAME_BYTES, VERDICT_BYTES = _FRAME.size, _VERDICT.size

T = TypeVar("T")


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
    """`part`, from 0, of `parts` equal parts of the grant's segments (see `part_of`)."""

    tag: int
    handoff: HandoffId
    epoch: int
    seq: int
    part: int = 0
    parts: int = 1

    def pack(self) -> bytes:
        """Raises WireError where the handoff id is too long to send."""
        handoff = self.handoff.encode()
        if len(handoff) > MAX_HANDOFF_BYTES:
            raise WireError(f"a handoff id may have {MAX_HANDOFF_BYTES} bytes, got {len(handoff)}")
        head = _CLAIM.pack(b"PDKC", self.tag, self.epoch, self.seq, self.part, self.parts, len(handoff))
        return head + handoff

    @classmethod
    def take(cls, received: bytearray) -> "Claim | None":
        """The first claim of `received`, removed from it; None while it is not whole."""
        if len(received) < CLAIM_BYTES:
            return None
        magic, tag, epoch, seq, part, parts, size = _CLAIM.unpack_from(received)
        if magic != b"PDKC" or size > MAX_HANDOFF_BYTES or not part < parts <= MAX_PARTS:
            raise WireError(f"expected a claim, got {bytes(received[:8])!r}")
        end = CLAIM_BYTES + size
        if len(received) < end:
            return None
        try:
            claim = cls(tag, HandoffId(received[CLAIM_BYTES:end].decode()), epoch, seq, part, parts)
        except UnicodeDecodeError as error:
            raise WireError(f"a handoff id is no UTF-8: {error}") from error
        del received[:end]
        return claim


class FrameHeader(NamedTuple):
    tag: int
    epoch: int
    seq: int
    num_bytes: int

    def pack(self) -> bytes:
        return _FRAME.pack(b"PDKF", self.tag, self.epoch, self.seq, self.num_bytes)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "FrameHeader":
        magic, tag, epoch, seq, num_bytes = _FRAME.unpack(data)
        if magic != b"PDKF":
            raise WireError(f"expected a frame, got {bytes(data[:8])!r}")
        return cls(tag, epoch, seq, num_bytes)


def pack_verdict(reason: str | None) -> bytes:
    """The end of a frame: why it must not be used, None if it is what was granted."""
    text = b"" if reason is None else reason.encode()[:MAX_REASON_BYTES] or b"the source failed"
    return _VERDICT.pack(b"PDKS", len(text)) + text


def reason_bytes(verdict: bytes | bytearray) -> int:
    """The size of the reason that follows a verdict's head; 0: the frame is good."""
    magic, size = _VERDICT.unpack(verdict)
    if magic != b"PDKS" or size > MAX_REASON_BYTES:
        raise WireError(f"expected a verdict, got {bytes(verdict)!r}")
    return int(size)


def part_of(items: Sequence[T], part: int, parts: int) -> Sequence[T]:
    """Part number `part` of `parts` parts of equal size, give or take one item; both ends cut alike."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def tune(sock: socket.socket, timeout_s: float) -> None:
    """Non-blocking, no delay for small records, and an end for connections whose peer vanished.

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
