"""Ray actors: thin shells around what also runs as a plain process.

Ray places, starts and watches them; no request ever passes through an actor call.
"""

import asyncio
import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdserve.core.errors import PdserveError, Unavailable, WorkerLost, from_foreign
from pdserve.router.process import RouterHost, RouterSpec
from pdserve.workers.spec import WorkerSpec

if TYPE_CHECKING:
    from pdserve.workers.process import WorkerHost

ANY_ADDRESS = ("0.0.0.0", "::")
"""Hosts that one can listen on and nobody can call."""

_OPTIONS = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 16}
"""Ray restarts nobody: a restart needs a new incarnation, which the supervisor sees to."""


class WorkerActor:
    """One worker. Built in `start`, so that a wrong specification arrives as the error that it is."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._host: WorkerHost | None = None

    async def start(self) -> dict[str, Any]:
        """Load, listen, announce; returns the worker's record."""
        # Here: the supervisor and the router's actor import this module too, and have no use for torch.
        from pdserve.workers.process import WorkerHost

        spec = WorkerSpec.from_dict(self._spec)
        if spec.host in ANY_ADDRESS:
            # A worker announces the address that it listens on.
            spec = dataclasses.replace(spec, host=ray.util.get_node_ip_address())
        self._host = WorkerHost(spec)
        record = await self._host.start()
        return record.to_dict()

    async def wait(self) -> None:
        """Never returns: whoever awaits it learns of the actor's death within milliseconds."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        if self._host is not None:
            await self._host.stop()


class RouterActor:
    """One router."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._host: RouterHost | None = None

    async def start(self) -> dict[str, Any]:
        """Listen; returns {"grpc": "host:port", "http": the same or None, "pid": …}, with a callable host."""
        self._host = RouterHost(RouterSpec.from_dict(self._spec))
        await self._host.start()
        http = self._host.http_endpoint
        return {
            "grpc": _callable(self._host.endpoint),
            "http": None if http is None else _callable(http),
            "pid": os.getpid(),
        }

    async def wait(self) -> None:
        """Never returns, see WorkerActor.wait."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        if self._host is not None:
            await self._host.stop()


def _callable(endpoint: str) -> str:
    """host:port with an address of this machine in place of one that means all of them."""
    host, _, port = endpoint.rpartition(":")
    return f"{ray.util.get_node_ip_address()}:{port}" if host in ANY_ADDRESS else endpoint


class ActorHandle:
    """A `Hosted` in a Ray actor; the actor ends with it. Turns Ray's errors into ours."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name = name
        self._actor = actor

    async def start(self) -> dict[str, Any]:
        return dict(await self._result(self._actor.start.remote()))

    async def wait(self) -> None:
        await self._result(self._actor.wait.remote())

    async def stop(self) -> None:
        await self._result(self._actor.stop.remote())

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._actor)

    async def _result(self, reference: Any) -> Any:
        try:
            return await reference
        except RayError as error:
            raise from_ray(self._name, error) from error


def from_ray(name: str, error: RayError) -> PdserveError:
    """What happened inside an actor, without Ray's wrapping; or that the actor, or Ray, is gone."""
    if isinstance(error, RayTaskError):
        return from_foreign(error.cause)
    if isinstance(error, RayActorError):
        return WorkerLost(f"the process of {name} died")
    return Unavailable(f"{name}: Ray does not answer ({type(error).__name__}); see its logs")


def launch_worker(spec: WorkerSpec, *, pinned: bool = True) -> ActorHandle:
    """Make an actor for a worker; `pinned`: on this machine, else wherever Ray likes."""
    return ActorHandle(spec.worker, _make(WorkerActor, spec.to_dict(), pinned))


def launch_router(spec: RouterSpec) -> ActorHandle:
    """Make an actor for a router, on this machine: its address is the one that users are told."""
    return ActorHandle("router", _make(RouterActor, spec.to_dict(), pinned=True))


def _make(kind: type, spec: dict[str, Any], pinned: bool) -> Any:
    options: dict[str, Any] = dict(_OPTIONS)
    if pinned:
        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(**options)(kind).remote(spec)
