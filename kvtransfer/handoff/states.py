"""The states of a handoff's two sides, and the ways in which one can end."""

from enum import StrEnum


class DecodeState(StrEnum):
    """D's side. COMMITTED and RELEASED are terminal."""

    OPEN = "open"
    """Asked P; no block is taken."""
    RESERVED = "reserved"
    """Every block of the request is taken; nobody writes yet."""
    FETCHING = "fetching"
    """Transports may write D's blocks."""
    VERIFIED = "verified"
    """All bytes are here and checked; P has been asked to release."""
    COMMITTED = "committed"
    """P answered ok: the KV is D's."""
    ABORTED = "aborted"
    """Given up; a transport may still write."""
    DRAINED = "drained"
    """No transport can write any more."""
    RELEASED = "released"
    """Nothing of this handoff is left at D."""


class PrefillState(StrEnum):
    """P's side. RELEASED is terminal."""

    OPEN = "open"
    """Accepted, waits for its share of the pool."""
    FILLING = "filling"
    """The engine computes; chunks are exposed as they become final."""
    FILLED = "filled"
    """Everything is computed and pinned for the reader."""
    ABORTED = "aborted"
    """Given up; the engine may still write, a transport may still read."""
    DRAINED = "drained"
    """Neither can touch the blocks any more."""
    RELEASED = "released"
    """Unpinned."""


class ReleaseStatus(StrEnum):
    """P's last word. Only OK lets D keep what it copied."""

    OK = "ok"
    EXPIRED = "expired"
    CACHED = "cached"


class Outcome(StrEnum):
    """Why D was not served."""

    REJECTED = "rejected"
    """P said no before it did any work."""
    SCHEMA = "schema"
    """P cannot serve this D at all: schema, representation or incarnation differ."""
    LOST = "lost"
    """P or the way to it went away."""
    FAILED = "failed"
    """P gave up: its prefill failed or it was told to stop."""
    EXPIRED = "expired"
    """P released the blocks before D had them."""
    CORRUPT = "corrupt"
    """Bytes that landed are not what P computed."""
    STALLED = "stalled"
    """A state's time was over before the request's: P or the way to it does not get on."""
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    PROTOCOL = "protocol"
    """P broke the rules of the conversation."""
