"""Is a worker alive? Pure: fed with what was heard, asked with the time."""


class Liveness:
    """Silence, or work without progress, for longer than a bound makes a worker suspect.

    A killed peer closes its stream at once; a stopped one does not, and a stuck engine sends heartbeats.
    """

    def __init__(self, silence_s: float, now: float) -> None:
        self._silence_s = silence_s
        self._heard = now
        self._moved = now
        self._progress: int | None = None

    def hear(self, now: float) -> None:
        """Any message came."""
        self._heard = now

    def beat(self, progress: int, busy: bool, now: float) -> None:
        """A heartbeat came. `busy`: the engine has something to compute, so `progress` has to grow."""
        self.hear(now)
        if progress != self._progress or not busy:
            self._moved = now
        self._progress = progress

    def suspect_for(self, now: float) -> float:
        """Seconds for which the worker has been suspect; 0.0 while it is not."""
        return max(0.0, now - min(self._heard, self._moved) - self._silence_s)

    def silent(self, now: float) -> bool:
        """Nothing was heard for longer than the bound."""
        return now - self._heard > self._silence_s

    def reason(self, now: float) -> str:
        """What is wrong, for messages."""
        if self.silent(now):
            return f"it has been silent for {now - self._heard:.1f} s"
        return f"its engine has work and made no step for {now - self._moved:.1f} s"
