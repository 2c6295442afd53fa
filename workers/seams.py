"""Where tests wrap a worker's parts: faults and delays come from outside, never from switches inside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from pdserve.core.lifecycle import Lifecycle
from pdserve.kvtransfer.handoff.decode_site import Importers
from pdserve.kvtransfer.handoff.filler import Filler
from pdserve.kvtransfer.transports.base import Exporter
from pdserve.workers.engine.messages import EngineClient
from pdserve.workers.engine.runner import ModelRunner

Observer = Callable[[Lifecycle, Mapping[str, object]], None]


def ignore(event: Lifecycle, facts: Mapping[str, object]) -> None:
    """The observer of a worker that nobody watches."""


@dataclass(frozen=True, slots=True)
class Seams:
    """Each field maps a part to what is used in its place; the defaults change nothing."""

    observer: Observer = ignore
    engine: Callable[[EngineClient], EngineClient] = lambda engine: engine
    runner: Callable[[ModelRunner], ModelRunner] = lambda runner: runner
    filler: Callable[[Filler], Filler] = lambda filler: filler
    importers: Callable[[Importers], Importers] = lambda importers: importers
    exporter: Callable[[Exporter], Exporter] = lambda exporter: exporter
    channel: Callable[[grpc.aio.Channel], grpc.aio.Channel] = lambda channel: channel
    """To a prefill worker: what D says on its handoffs' streams, and hears."""
