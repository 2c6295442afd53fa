"""What the shells of both sides share: feeding a machine, its tasks, its stream and its timers."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Generic, Protocol, TypeVar

from pdserve.core.clock import Clock
from pdserve.core.config import HandoffConfig
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import HandoffId, RequestId
from pdserve.kvtransfer.handoff.events import StreamClosed
from pdserve.kvtransfer.handoff.instructions import Instruction
from pdserve.kvtransfer.handoff.state_deadlines import StateBound
from pdserve.kvtransfer.handoff.table import Table, Transcript
from pdserve.kvtransfer.handoff.watch import PeerWatch

_log = logging.getLogger(__name__)

Observer = Callable[[Lifecycle, Mapping[str, object]], None]

_GIVEN_UP = frozenset({"aborted", "drained"})

_TICK_S = 0.001
"""The least time to the next look at a bound: what a loop's timer is exact to."""


class SideMachine(Protocol):
    """Either side's machine."""

    @property
    def state(self) -> Any: ...

    @property
    def terminal(self) -> bool: ...


M = TypeVar("M", bound=SideMachine)
Out = TypeVar("Out")


class Shell(ABC, Generic[M, Out]):
    """Feeds one machine on the event loop and carries out what it says. Not thread-safe.

    `outbox` holds the messages to send, None behind the last one. `over` is set when the conversation is;
    `ended` when the machine is terminal.
    """

    def __init__(
        self,
        table: Table[M],
        machine: M,
        *,
        handoff: HandoffId,
        request: RequestId,
        config: HandoffConfig,
        clock: Clock,
        observer: Observer | None,
        counters: Counter[str],
    ) -> None:
        self.handoff = handoff
        self.request = request
        self.config = config
        self.clock = clock
        self.counters = counters
        self.outbox: asyncio.Queue[Out | None] = asyncio.Queue()
        self.over = asyncio.Event()
        self.ended = asyncio.Event()
        self.watch = PeerWatch(config.silence_s, clock.now())
        self.beats = 0
        self._transcript = Transcript(table, machine)
        self._observer = observer
        self._events: deque[object] = deque()
        self._carrying = False
        self._broken = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._entered_at = clock.now()
        """When the present state began."""
        self._timed = False
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0

    @property
    def machine(self) -> M:
        return self._transcript.machine

    @property
    def story(self) -> str:
        """How the handoff got where it is, for logs."""
        return " > ".join(f"{event} in {state}" for state, event in self._transcript.story)

    def feed(self, event: object) -> None:
        """Move the machine. A call from within an instruction is carried out behind the present one."""
        self._events.append(event)
        if self._carrying:
            return
        self._carrying = True
        try:
            while self._events:
                self._step(self._events.popleft())
        except Exception as error:
            self._events.clear()
            self._carrying = False
            self._defect(error)
        finally:
            self._carrying = False
        if self.machine.terminal or self._broken:
            self._end_conversation()
            self.ended.set()
        self._mind_bound()

    async def finished(self) -> None:
        """Wait until nothing of this handoff runs any more."""
        await self.ended.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # For the two sides

    @abstractmethod
    def _carry_out(self, instruction: Instruction) -> None: ...

    @abstractmethod
    def _defect(self, error: Exception) -> None:
        """An instruction or the table failed: give up with as much order as is left."""

    @abstractmethod
    def _heartbeat(self) -> Out: ...

    @abstractmethod
    def _peer_works(self) -> bool:
        """Whether the peer has work of ours on which it should get on."""

    @abstractmethod
    def _bound(self) -> StateBound:
        """The latest moment at which the present, live state may still last; it may move with every event."""

    def _gave_up(self, state: str) -> None:
        """The machine left `state` for ABORTED."""

    def _observe(self, event: Lifecycle, **facts: object) -> None:
        if self._observer is not None:
            self._observer(event, {"handoff": self.handoff, "request": self.request, **facts})

    def _send(self, message: Out) -> None:
        if not self.over.is_set():
            self.outbox.put_nowait(message)

    def _spawn(
        self, work: Coroutine[Any, Any, Any], ended: Callable[[asyncio.Task[Any]], None] | None = None
    ) -> asyncio.Task[Any]:
        """Run `work` beside the machine. `ended` reads how it ended; without it, an error is a defect."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(ended or self._check_ended)
        return task

    def _check_ended(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or not isinstance(error := task.exception(), Exception):
            return
        if self.over.is_set():
            _log.error("handoff %s failed behind its conversation", self.handoff, exc_info=error)
        else:
            self._defect(error)

    def _start_timers(self) -> None:
        """The states' bounds, and heartbeats until the conversation is over."""
        self._timed = True
        self._mind_bound()
        self._spawn(self._beat())

    def _log_defect(self, error: Exception) -> None:
        _log.error(
            "handoff %s of request %s is broken, its story: %s",
            self.handoff,
            self.request,
            self.story,
            exc_info=error,
        )
        self.counters["defects"] += 1

    def _break(self) -> None:
        """Even giving up failed: nothing more is done for this handoff."""
        self._broken = True

    # Its own

    def _step(self, event: object) -> None:
        if self.machine.terminal or self._broken:
            return
        before = str(self.machine.state)
        instructions = self._transcript.feed(event)
        if str(self.machine.state) != before:
            self._entered_at = self.clock.now()
        if before not in _GIVEN_UP and str(self.machine.state) in _GIVEN_UP:
            self.counters[f"aborted_in_{before}"] += 1
            self._gave_up(before)
        for instruction in instructions:
            self._carry_out(instruction)
        if str(self.machine.state) in _GIVEN_UP:
            self._end_conversation()

    def _end_conversation(self) -> None:
        if self.over.is_set():
            return
        self.outbox.put_nowait(None)
        self.over.set()
        if self._timer is not None:
            self._timer.cancel()

    def _mind_bound(self) -> None:
        """Wake up when the present state's time is over. A timer that comes too early looks again."""
        if self.over.is_set() or not self._timed:
            return
        at = self._bound().at
        if self._timer is not None:
            if self._wakes_at <= at:
                return
            self._timer.cancel()
        self._wakes_at = at
        delay = max(_TICK_S, at - self.clock.now())
        self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _look(self) -> None:
        """A timer came: end the state, if its bound has not moved meanwhile."""
        self._timer = None
        now, bound = self.clock.now(), self._bound()
        if not bound.final and now - self._wakes_at > self.config.silence_s / 2:
            # This process itself was stopped: what the peer said meanwhile is still unread.
            self._entered_at = now
            bound = self._bound()
        if now < bound.at:
            self._mind_bound()
            return
        state = str(self.machine.state)
        self.counters[f"expired_in_{state}"] += 1
        expired = bound.passed(state, now)
        _log.warning("handoff %s of request %s waited %s", self.handoff, self.request, expired.reason)
        self.feed(expired)

    async def _beat(self) -> None:
        while not self.over.is_set():
            try:
                async with asyncio.timeout(self.config.heartbeat_s):
                    await self.over.wait()
                return
            except TimeoutError:
                self.beats += 1
            self._send(self._heartbeat())
            suspicion = self.watch.suspicion(self.clock.now(), working=self._peer_works())
            if suspicion is not None:
                self.counters["silent_peers"] += 1
                _log.warning("handoff %s of request %s: %s", self.handoff, self.request, suspicion)
                self.feed(StreamClosed(suspicion))
            self._on_beat()

    def _on_beat(self) -> None:
        """Once per heartbeat while the conversation lasts."""
