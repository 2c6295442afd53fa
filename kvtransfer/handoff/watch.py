"""Whether the peer of a stream is still there and still gets on. No I/O; the caller brings the time."""


class PeerWatch:
    """Suspects a peer that says nothing, or works without getting on, for `silence_s` seconds.

    A process that was stopped itself has read nothing for as long: its own pause counts for nobody.
    """

    def __init__(self, silence_s: float, now: float) -> None:
        self._silence_s = silence_s
        self._looked_at = now
        self._heard_at = now
        self._moved_at = now
        self._progress: int | None = None

    def heard(self, now: float) -> None:
        """Any message of the peer."""
        self._heard_at = now

    def progressed(self, progress: int, now: float) -> None:
        """A heartbeat and its counter; only that it changes means something."""
        self.heard(now)
        if progress != self._progress:
            self._progress = progress
            self._moved_at = now

    def suspicion(self, now: float, *, working: bool) -> str | None:
        """Why the peer counts as lost; None if it does not. `working`: the peer has work of ours.

        Call it several times per `silence_s`.
        """
        paused = now - self._looked_at > self._silence_s / 2
        self._looked_at = now
        if paused:
            self._heard_at = self._moved_at = now
        if not working:
            self._moved_at = now
        if now - self._heard_at > self._silence_s:
            return f"the peer said nothing for {now - self._heard_at:.1f} s, the limit is {self._silence_s} s"
        if now - self._moved_at > self._silence_s:
            stuck_s = now - self._moved_at
            return f"the peer made no progress for {stuck_s:.1f} s, the limit is {self._silence_s} s"
        return None
