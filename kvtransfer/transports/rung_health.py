"""Whether a rung that works is worth its place, judged by its bandwidth. Pure: the caller brings the time.

A rung is left where it is slower by a clear factor than the next lower one is for this worker. Where nobody
knows the lower one, it is tried by a pair that is far slower than others are on the same rung. Whoever was
left is tried again later, each time after twice as long, and at once when what took its place is no better.
"""

from dataclasses import dataclass, replace

REAL_BYTES = 1 << 20
"""What is smaller shows latency, not bandwidth."""

JUDGED_SAMPLES = 8
"""Measurements before a pace means anything."""

CLEARLY = 4.0
"""Times as slow as the lower rung: more than what other work on the machine makes of one rung and not of
the other."""

FAR = 16.0
"""Times as slow as other pairs on the same rung, where nothing is known of the lower one."""

FIRST_RETRY_S = 30.0
_MOST_DOUBLINGS = 7

_WEIGHT = 0.25
"""Of the newest measurement: one outlier moves nobody."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Bytes per second over a rung, newer measurements weigh more."""

    samples: int = 0
    rate: float = 0.0

    def plus(self, num_bytes: int, seconds: float) -> "Pace":
        """With one more measurement."""
        rate = num_bytes / seconds
        weight = max(_WEIGHT, 1.0 / (self.samples + 1))
        return Pace(self.samples + 1, self.rate + weight * (rate - self.rate))

    @property
    def known(self) -> bool:
        return self.samples >= JUDGED_SAMPLES


UNKNOWN = Pace()


@dataclass(frozen=True, slots=True)
class Meter:
    """Measures what comes over one pair's rung while anything is under way, however much at once.

    The time of a single fetch says little: it shares the way with the fetches beside it.
    """

    in_flight: int = 0
    since: float = 0.0
    num_bytes: int = 0

    def began(self, now: float) -> "Meter":
        """One more fetch is under way."""
        if self.in_flight:
            return replace(self, in_flight=self.in_flight + 1)
        return Meter(1, now)

    def ended(self, now: float, num_bytes: int) -> tuple["Meter", tuple[int, float] | None]:
        """One fetch less, with what it brought; and (bytes, seconds) where that makes a measurement."""
        moved, seconds = self.num_bytes + num_bytes, now - self.since
        if moved >= REAL_BYTES and seconds > 0:
            return Meter(self.in_flight - 1, now), (moved, seconds)
        return Meter(self.in_flight - 1, self.since, moved), None


def why_leave(here: Pace, below: Pace, elsewhere: Pace) -> str | None:
    """Why a pair should go down a rung; None where it should not.

    `below`: this worker's pace over the next lower rung; `elsewhere`: the best of its other pairs over this
    one.
    """
    if not here.known:
        return None
    if below.known:
        slow, than = here.rate * CLEARLY < below.rate, "the next rung reaches"
        compared = below
    else:
        slow, than = elsewhere.known and here.rate * FAR < elsewhere.rate, "another pair reaches over it"
        compared = elsewhere
    return f"{here.rate / 1e9:.3f} GB/s where {than} {compared.rate / 1e9:.3f} GB/s" if slow else None


def is_no_better(substitute: Pace, left: Pace) -> bool:
    """Whether going down has brought nothing."""
    return substitute.known and substitute.rate <= left.rate


def retry_s(times: int) -> float:
    """Seconds until a rung that was left `times` times is tried again."""
    return FIRST_RETRY_S * 2.0 ** min(times - 1, _MOST_DOUBLINGS)
