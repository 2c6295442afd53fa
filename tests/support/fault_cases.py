"""The fault matrix: which fault strikes whom in which state, how long that may take, and how it must end."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from fault_points import Fault

from pdserve.core.config import EngineConfig, HandoffConfig, IndexConfig, SessionConfig
from pdserve.core.types import Role

ENGINE = EngineConfig(pool_blocks=128, chunk_tokens=32, token_budget=64, headroom_tokens=64)
HANDOFF = HandoffConfig(heartbeat_s=0.25, silence_s=1.5)
SESSION = SessionConfig(heartbeat_s=0.25, silence_s=1.5, reattach_s=2.0)
INDEX = IndexConfig(timeout_s=1.0, heartbeat_s=0.25, ttl_s=2.0)
NAMES = {"P": "prefill-0", "D": "decode-0"}
ROLES = {"P": Role.PREFILL, "D": Role.DECODE}
STEP_S = 0.01
"""What an engine's step takes at least."""

PROMPT_TOKENS = 230
"""229 positions travel, in eight chunks of which the last one is partial."""
CHUNKS = 8
COMPLETION_TOKENS = 24
STRIKES_AT_TOKEN = 6
STOPPED_S = 5.0
"""Longer than every bound after which a peer counts as lost."""
LINK_SHARE = 0.01

NORMAL_S = 10.0
"""A whole request without a fault, recomputed once, on a busy machine."""
DEADLINE_S = 25.0
"""Of every request: above all bounds, so that none is met by the deadline alone."""


class Kind(StrEnum):
    SIGKILL = "SIGKILL"
    SIGSTOP = "SIGSTOP 5 s"
    CORRUPT = "corrupt byte"
    LINK = "link at 1 %"
    LOST = "lost message"
    REDIS = "redis gone"


class End(StrEnum):
    """How a request may end."""

    TOKENS = "tokens"
    """All of them, as the reference has them."""
    RETRIABLE = "retriable"
    """An error that says so, behind tokens that are a part of the reference."""


STATES = {
    "D OPEN": ("D", "connect", 1),
    "D RESERVED": ("D", "reserved", 1),
    "D FETCHING": ("D", "fetch", 2),
    "D VERIFIED": ("D", "verified", 1),
    "D COMMITTED": ("D", "token", STRIKES_AT_TOKEN),
    "P OPEN": ("P", "prefill_queued", 1),
    "P FILLING": ("P", "chunk_ready", 2),
    "P FILLED": ("D", "filled_seen", 1),
}
"""State -> who passes which point in it, for which time."""

LOST_MESSAGES = {
    "open": ("D OPEN", "to-p/open", 1),
    "opened": ("D OPEN", "to-d/opened", 1),
    "first chunk": ("D OPEN", "to-d/chunk", 1),
    "grant": ("D FETCHING", "to-p/grant", 2),
    "third chunk": ("D FETCHING", "to-d/chunk", 3),
    "last chunk": ("D FETCHING", "to-d/chunk", CHUNKS),
    "filled": ("P FILLED", "to-d/filled", 1),
    "release": ("D VERIFIED", "to-p/release", 1),
    "released": ("D VERIFIED", "to-d/released", 1),
}
"""Message -> D's state, or P's, while it is missed; its point; which of its kind."""


@dataclass(frozen=True, slots=True)
class Pids:
    """The processes of one cluster now."""

    P: int
    D: int
    redis: int

    def of(self, side: str) -> int:
        return self.P if side == "P" else self.D


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the matrix, for any transport."""

    kind: Kind
    state: str
    victim: str = ""
    """P or D, where a process is struck."""
    what: str = ""
    """Which message or byte."""

    @property
    def name(self) -> str:
        parts = (
            self.kind.name.lower(),
            self.victim,
            self.state.replace(" ", "-"),
            self.what.replace(" ", "-"),
        )
        return "_".join(part for part in parts if part)

    @property
    def ends(self) -> frozenset[End]:
        """Tokens whenever D lives: it can always compute. A D that is lost costs its streams."""
        return frozenset({End.RETRIABLE if self.victim == "D" else End.TOKENS})

    @property
    def committed(self) -> bool:
        """D has the KV before the fault strikes, so nothing is computed again."""
        return self.state == "D COMMITTED"

    def bound_s(self, slow_s: float) -> float:
        """Within how many seconds from the call the request ends. `slow_s`: its bytes on the slow link."""
        match self.kind:
            case Kind.SIGKILL if self.victim == "D":
                return SESSION.reattach_s + NORMAL_S  # the router waits for D to come back
            case Kind.SIGSTOP if self.victim == "D":
                return SESSION.silence_s + SESSION.heartbeat_s + SESSION.reattach_s + NORMAL_S
            case Kind.SIGSTOP | Kind.LOST:
                return HANDOFF.silence_s + HANDOFF.heartbeat_s + NORMAL_S
            case Kind.LINK:
                return slow_s + NORMAL_S
            case Kind.REDIS:
                return INDEX.timeout_s + NORMAL_S
        return NORMAL_S

    def faults(self, pids: Pids) -> Mapping[str, list[Fault]]:
        """By side, what to arm."""
        side, point, nth = STATES[self.state]
        match self.kind:
            case Kind.LOST:
                _, message, which = LOST_MESSAGES[self.what]
                return {"D": [Fault(message, "drop", which)]}
            case Kind.CORRUPT if self.what == "on the wire":
                # Behind the header of a frame, in the first chunk's blocks.
                return {"D": [Fault("connect", "wire", offset=10_000)]}
            case Kind.CORRUPT:
                return {"D": [Fault("fetch", "flip", CHUNKS if "last" in self.what else 1, pid=pids.P)]}
            case Kind.LINK:
                return {side: [Fault(point, "slow", nth, share=LINK_SHARE)]}
            case Kind.REDIS:
                strike = Fault(point, "signal", nth, pid=pids.redis, signal=signal.SIGKILL)
            case _:
                number = signal.SIGKILL if self.kind is Kind.SIGKILL else signal.SIGSTOP
                strike = Fault(point, "signal", nth, pid=pids.of(self.victim), signal=number)
        # Without a way to P, D stays in RESERVED.
        stay = [Fault("connect", "hold")] if self.state == "D RESERVED" else []
        return {side: [*stay, strike]}


def matrix(transport: str) -> Iterator[Case]:
    """Every case of one transport, in a fixed order. In one process nobody dies alone; no link is slow."""
    if transport != "inproc":
        for kind in (Kind.SIGKILL, Kind.SIGSTOP):
            for victim in ("P", "D"):
                yield from (Case(kind, state, victim) for state in STATES)
        yield from (Case(Kind.LINK, state) for state in ("D OPEN", "D FETCHING"))
    yield Case(Kind.CORRUPT, "D FETCHING", what="of the first chunk")
    yield Case(Kind.CORRUPT, "P FILLED", what="of the last chunk")
    if transport == "tcp":
        yield Case(Kind.CORRUPT, "D FETCHING", what="on the wire")
    yield from (Case(Kind.LOST, state, what=what) for what, (state, _, _) in LOST_MESSAGES.items())
    yield from (Case(Kind.REDIS, state) for state in STATES)
