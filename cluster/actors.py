"""Ray actors: thin shells around what also runs as a plain process.

Ray places, starts and watches them; no request ever passes through an actor call.
"""

import asyncio
import os
from typing import Any

import ray

from pdserve.router.process import RouterHost, RouterSpec
from pdserve.workers.process import WorkerHost
from pdserve.workers.spec import WorkerSpec

_OPTIONS = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 16}
"""Ray restarts nobody: a restart needs a new incarnation, which the supervisor sees to."""


class WorkerActor:
    """One worker."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._host = WorkerHost(WorkerSpec.from_dict(spec))

    async def start(self) -> dict[str, Any]:
        """Load, listen, announce; returns the worker's record."""
        record = await self._host.start()
        return record.to_dict()

    async def wait(self) -> None:
        """Never returns: whoever awaits it learns of the actor's death within milliseconds."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self._host.stop()


class RouterActor:
    """One router."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._host = RouterHost(RouterSpec.from_dict(spec))

    async def start(self) -> dict[str, Any]:
        """Listen; returns {"grpc": "host:port", "pid": …}."""
        await self._host.start()
        return {"grpc": self._host.endpoint, "pid": os.getpid()}

    async def wait(self) -> None:
        """Never returns, see WorkerActor.wait."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self._host.stop()


def start_worker_actor(spec: WorkerSpec) -> Any:
    """A handle whose methods take `.remote()`; the actor ends with it."""
    return ray.remote(**_OPTIONS)(WorkerActor).remote(spec.to_dict())


def start_router_actor(spec: RouterSpec) -> Any:
    """As `start_worker_actor`, for a router."""
    return ray.remote(**_OPTIONS)(RouterActor).remote(spec.to_dict())
