"""What D and P tell each other on the socket of an epoch, little-endian, each record behind its own magic.

    D → P   Hello    version, the offer's token, D's number of the epoch, from 1, NCCL's version;
                     0: D only asks, and leaves with the answer
    P → D   Welcome  version; empty, or why not
    D → P   Join     NCCL's unique id; both join the communicator, D as rank 0
    D → P   Claim    tag, epoch, seq, handoff id: "I am the one whom that grant is for"
    P → D   Ready    tag, size; packed, and the sources were right before and after; or why not
    D → P   Post     tag, place in the order of the pair, from 1; or 0: no longer wanted
            both post, the blocks travel

D alone says what is posted and in which order, when it has room. A payload of no bytes is not posted. The
socket lives as long as the communicator: where it ends, both abort.
"""

import struct
from typing import NamedTuple

from pdserve.core.types import HandoffId
from pdserve.kvtransfer.gpu.nccl import UNIQUE_ID_BYTES
from pdserve.kvtransfer.transports.nccl.stream import ControlStream

VERSION = 1
VISIT = 0
"""For an epoch in Hello: none is to follow."""
TOKEN_BYTES = 16
MAX_TEXT_BYTES = 1024
"""Of a reason, and of a handoff's id."""

_HELLO = struct.Struct("<4sH16sQI")
_WELCOME = struct.Struct("<4sHH")
_JOIN = struct.Struct(f"<4s{UNIQUE_ID_BYTES}s")
_CLAIM = struct.Struct("<4sQQQH")
_READY = struct.Struct("<4sQQH")
_POST = struct.Struct("<4sQQ")
_KIND_BYTES = 4


class WireError(ConnectionError):
    """The peer does not speak this protocol, or no longer: the epoch ends."""


class Hello(NamedTuple):
    token: bytes
    epoch: int
    nccl_version: int

    def pack(self) -> bytes:
        return _HELLO.pack(b"PDNH", VERSION, self.token, self.epoch, self.nccl_version)


class Welcome(NamedTuple):
    refused: str
    """Why; empty where the reader is welcome."""

    def pack(self) -> bytes:
        text = _text(self.refused)
        return _WELCOME.pack(b"PDNW", VERSION, len(text)) + text


class Join(NamedTuple):
    unique_id: bytes

    def pack(self) -> bytes:
        return _JOIN.pack(b"PDNJ", self.unique_id)


class Claim(NamedTuple):
    tag: int
    handoff: HandoffId
    epoch: int
    seq: int

    def pack(self) -> bytes:
        handoff = self.handoff.encode()
        if len(handoff) > MAX_TEXT_BYTES:
            raise WireError(f"a handoff id may have {MAX_TEXT_BYTES} bytes, got {len(handoff)}")
        return _CLAIM.pack(b"PDNC", self.tag, self.epoch, self.seq, len(handoff)) + handoff


class Ready(NamedTuple):
    tag: int
    num_bytes: int
    refused: str = ""
    """Why nothing comes; empty where it does."""

    def pack(self) -> bytes:
        text = _text(self.refused)
        return _READY.pack(b"PDNR", self.tag, self.num_bytes, len(text)) + text


class Post(NamedTuple):
    tag: int
    order: int
    """0: the reader does not want it any more."""

    def pack(self) -> bytes:
        return _POST.pack(b"PDNP", self.tag, self.order)


async def receive_hello(stream: ControlStream) -> Hello:
    magic, version, token, epoch, nccl_version = _HELLO.unpack(await stream.receive_exactly(_HELLO.size))
    if magic != b"PDNH" or version != VERSION:
        raise WireError(f"expected a hello of version {VERSION}, got {magic!r} version {version}")
    return Hello(token, epoch, nccl_version)


async def receive_welcome(stream: ControlStream) -> Welcome:
    magic, version, size = _WELCOME.unpack(await stream.receive_exactly(_WELCOME.size))
    if magic != b"PDNW" or version != VERSION:
        raise WireError(f"expected a welcome of version {VERSION}, got {magic!r} version {version}")
    return Welcome(await _receive_text(stream, size))


async def receive_join(stream: ControlStream) -> Join:
    magic, unique_id = _JOIN.unpack(await stream.receive_exactly(_JOIN.size))
    if magic != b"PDNJ":
        raise WireError(f"expected a unique id, got {magic!r}")
    return Join(unique_id)


async def receive_ready(stream: ControlStream) -> Ready:
    magic, tag, num_bytes, size = _READY.unpack(await stream.receive_exactly(_READY.size))
    if magic != b"PDNR":
        raise WireError(f"expected an answer to a claim, got {magic!r}")
    return Ready(tag, num_bytes, await _receive_text(stream, size))


async def receive_request(stream: ControlStream) -> Claim | Post:
    kind = await stream.receive_exactly(_KIND_BYTES)
    if kind == b"PDNP":
        _, tag, order = _POST.unpack(kind + await stream.receive_exactly(_POST.size - _KIND_BYTES))
        return Post(tag, order)
    if kind != b"PDNC":
        raise WireError(f"expected a claim or a post, got {bytes(kind)!r}")
    _, tag, epoch, seq, size = _CLAIM.unpack(kind + await stream.receive_exactly(_CLAIM.size - _KIND_BYTES))
    return Claim(tag, HandoffId(await _receive_text(stream, size)), epoch, seq)


def _text(text: str) -> bytes:
    return text.encode()[:MAX_TEXT_BYTES]


async def _receive_text(stream: ControlStream, size: int) -> str:
    if size > MAX_TEXT_BYTES:
        raise WireError(f"a text may have {MAX_TEXT_BYTES} bytes, got {size}")
    return (await stream.receive_exactly(size)).decode(errors="replace")
