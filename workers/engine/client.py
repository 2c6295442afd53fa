"""The engine as a thread of its own, spoken to from one event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import torch

from pdserve.core.errors import ConfigError, InternalError, PdserveError, Unavailable
from pdserve.core.types import SequenceId
from pdserve.workers.engine.engine import Engine
from pdserve.workers.engine.messages import EngineStats, SequenceSpec, StepOutputs

_STALLED_STEP_S: Final = 0.1
"""Well below the silence that makes a worker suspect."""

_INTAKE_TOKENS: Final = 65_536
"""Of the sequences taken in before one step: their books take about 0.5 µs per token, and the batch waits."""

_ABORT_TOKENS: Final = 2_048
"""What an abort counts as: it gives a whole table back."""


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence_id: SequenceId


@dataclass(frozen=True, slots=True)
class _SetRoleWeight:
    weight: float


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in the outbox."""

    error: PdserveError | None


_Command = SequenceSpec | _Abort | _SetRoleWeight


class ThreadEngineClient:
    """An EngineClient over an Engine in this process.

    Inbox: producer is any thread (`submit`, `abort`, `set_role_weight`), consumer the engine's thread,
    between steps. Outbox: producer is the engine's thread, with one `call_soon_threadsafe` per step, consumer
    the reader of `outputs` in the loop that called `start`.
    """

    def __init__(
        self,
        engine: Engine,
        threads: int = 1,
        name: str = "engine",
        stalled_step_s: float = _STALLED_STEP_S,
        intake_tokens: int = _INTAKE_TOKENS,
    ) -> None:
        """Takes the engine over: nobody else may call it.

        `threads` are torch's, for the engine's arithmetic. While everything that lives waits for memory the
        engine still steps every `stalled_step_s` seconds, so that its progress says that it is alive. Between
        two steps it takes one command, and more while they are of `intake_tokens` tokens together.
        """
        self._intake_tokens = intake_tokens
        self._stalled_step_s = stalled_step_s
        self._engine = engine
        self._threads = threads
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._stepping = threading.Lock()  # held while the engine is in use
        self._changed = threading.Condition()  # guards what follows
        self._inbox: list[_Command] = []
        self._taken: list[_Command] = []  # taken from the inbox, not yet in `_stats`
        self._stats = engine.stats()
        self._has_memory_news = False
        self._is_stopping = False
        self._failure: PdserveError | None = None
        self._outbox: asyncio.Queue[StepOutputs | _End] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start the thread; outputs go to the running loop. Raises InternalError the second time."""
        if self._loop is not None or self._is_stopping:
            raise InternalError("the engine was started or stopped before: make a new one")
        self._loop = asyncio.get_running_loop()
        self._engine.add_memory_listener(self._on_memory)
        self._thread.start()

    async def stop(self) -> None:
        """Abort what lives, end `outputs`, wait for the thread. Idempotent."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._loop is None:
            self._outbox.put_nowait(_End(None))
        else:
            await asyncio.to_thread(self._thread.join)

    def submit(self, spec: SequenceSpec) -> None:
        """See `EngineClient.submit`."""
        with self._changed:
            self._raise_failure()
            if self._is_stopping:
                raise Unavailable(f"the engine is stopped: send {spec.sequence_id} to another worker")
            self._put(spec)

    def abort(self, sequence_id: SequenceId) -> None:
        """See `EngineClient.abort`."""
        with self._changed:
            self._put(_Abort(sequence_id))

    def set_role_weight(self, weight: float) -> None:
        """See `EngineClient.set_role_weight`. Raises ConfigError outside of [0, 1]."""
        if not 0.0 <= weight <= 1.0:
            raise ConfigError(f"role weight is {weight!r}: it must be between 0 (decode) and 1 (prefill)")
        with self._changed:
            self._put(_SetRoleWeight(weight))

    async def outputs(self) -> AsyncIterator[StepOutputs]:
        """See `EngineClient.outputs`."""
        while True:
            item = await self._outbox.get()
            if isinstance(item, _End):
                self._outbox.put_nowait(item)  # so that a later reader ends too
                if item.error is not None:
                    raise item.error
                return
            yield item

    def stats(self) -> EngineStats:
        """See `EngineClient.stats`. Counts what the engine has not taken from its inbox as waiting."""
        with self._changed:
            self._raise_failure()
            queued = [c for c in (*self._taken, *self._inbox) if isinstance(c, SequenceSpec)]
            stats = self._stats
        return replace(
            stats,
            waiting=stats.waiting + len(queued),
            queued_prefill_tokens=stats.queued_prefill_tokens
            + sum(len(spec.token_ids) - spec.num_computed for spec in queued),
            # One that comes with its KV has one token to run: it decodes.
            queued_prefills=stats.queued_prefills + sum(not spec.num_computed for spec in queued),
            perf=self._engine.perf_snapshot(),
        )

    def check_integrity(self) -> None:
        """See `EngineClient.check_integrity`."""
        with self._stepping:
            self._engine.check_integrity()

    def _put(self, command: _Command) -> None:
        self._inbox.append(command)
        self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _on_memory(self) -> None:
        """Whoever freed blocks calls this. What the engine frees itself, its own step has seen."""
        if threading.current_thread() is self._thread:
            return
        with self._changed:
            self._has_memory_news = True
            self._changed.notify_all()

    def _main(self) -> None:
        """The engine's thread, which ends with an `_End` in the outbox, whatever happens."""
        failure: PdserveError | None = None
        try:
            torch.set_num_threads(self._threads)
            while self._take_commands():
                self._step()
        except BaseException as error:
            failure = InternalError(f"the engine ended: {type(error).__name__}: {error}")
            failure.__cause__ = error
        self._finish(failure)

    def _take_commands(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._changed:
            if not self._engine.has_work:
                self._changed.wait_for(lambda: self._inbox or self._is_stopping)
            elif self._engine.is_stalled:
                self._changed.wait_for(
                    lambda: self._inbox or self._is_stopping or self._has_memory_news,
                    self._stalled_step_s,
                )
            self._has_memory_news = False
            count = self._intake()
            self._taken, self._inbox = self._inbox[:count], self._inbox[count:]
            return not self._is_stopping

    def _intake(self) -> int:
        """How many commands, in their order, are taken before the next step."""
        left = self._intake_tokens
        for count, command in enumerate(self._inbox):
            left -= _tokens(command)
            if left < 0:
                return max(1, count)
        return len(self._inbox)

    def _step(self) -> None:
        with self._stepping:
            for command in self._taken:
                self._apply(command)
            outputs = self._engine.step()
            stats = self._engine.stats()
        with self._changed:
            self._stats, self._taken = stats, []
        if outputs.items:
            self._deliver(outputs)

    def _apply(self, command: _Command) -> None:
        match command:
            case SequenceSpec():
                self._engine.submit(command)
            case _Abort():
                self._engine.abort(command.sequence_id)
            case _SetRoleWeight():
                self._engine.set_role_weight(command.weight)

    def _finish(self, failure: PdserveError | None) -> None:
        with self._changed:
            self._is_stopping = True
            self._failure = failure
            commands, self._taken, self._inbox = [*self._taken, *self._inbox], [], []
        with self._stepping:
            if failure is None:
                for command in commands:
                    self._apply(command)
                self._engine.abort_all()
            else:
                self._engine.fail_all(failure, [c for c in commands if isinstance(c, SequenceSpec)])
            last = self._engine.take_outputs()
            stats = self._engine.stats()
        with self._changed:
            self._stats = stats
        with suppress(RuntimeError):  # the loop was closed without `stop`: nobody reads any more
            if last.items:
                self._deliver(last)
            self._deliver(_End(failure))

    def _deliver(self, item: StepOutputs | _End) -> None:
        """Raises RuntimeError where the loop is closed."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)


def _tokens(command: _Command) -> int:
    """What taking it costs, in tokens of a sequence."""
    match command:
        case SequenceSpec():
            return len(command.token_ids)
        case _Abort():
            return _ABORT_TOKENS
        case _SetRoleWeight():
            return 0
