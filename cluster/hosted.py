"""A worker or a router in a process of its own, as the cluster sees it."""

from typing import Any, Protocol


class Hosted(Protocol):
    """Started once, awaited, ended. Every error is a PdserveError."""

    async def start(self) -> dict[str, Any]:
        """Returns when it serves, with what it says of itself. Raises what went wrong there."""
        ...

    async def wait(self) -> None:
        """Returns, or raises WorkerLost, when it has died or serves no more."""
        ...

    async def stop(self) -> None:
        """End it in order."""
        ...

    def kill(self) -> None:
        """End it at once; for one that is gone already, nothing."""
        ...
