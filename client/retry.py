"""When to try again, and how long to wait before. Pure: no clock, no I/O, the randomness is handed in."""

from dataclasses import dataclass

from pdserve.core.errors import GrpcCode, PdserveError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounded exponential back-off with jitter. Times in seconds."""

    attempts: int = 3
    """Calls in all, the first one included."""
    base_s: float = 0.1
    factor: float = 3.0
    cap_s: float = 2.0

    def delay(self, error: PdserveError, attempt: int, left_s: float | None, jitter: float) -> float | None:
        """Seconds to wait before the next call; None: give up and raise `error`.

        Only UNAVAILABLE is tried again: nobody took the request. What was shed (RESOURCE_EXHAUSTED) is not,
        since more calls are what the server cannot bear. A wait that would outlast the deadline is not begun.

        Args:
            attempt: calls made so far, from 1.
            left_s: what is left of the caller's time; None without a deadline.
            jitter: in [0, 1); spreads clients that failed together.
        """
        if error.grpc_code != GrpcCode.UNAVAILABLE or not error.retriable or attempt >= self.attempts:
            return None
        ceiling = min(self.cap_s, self.base_s * self.factor ** (attempt - 1))
        delay = max(ceiling * (0.5 + 0.5 * jitter), error.retry_after_s or 0.0)
        if left_s is not None and delay >= left_s:
            return None
        return delay
