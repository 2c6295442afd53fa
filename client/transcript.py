"""What has arrived of one completion: choices kept apart, usage summed, ledger closed. No I/O."""

from pdserve.client import convert
from pdserve.client.choice_transcript import ChoiceTranscript
from pdserve.client.values import Choice, Chunk, Partial, Result, Route
from pdserve.core.errors import InternalError
from pdserve.core.lifecycle import Ledger
from pdserve.core.types import RequestId, Usage
from pdserve.proto import inference_pb2 as pb


class Transcript:
    """Messages in, Result out. Times are seconds on the caller's one clock."""

    def __init__(self, called_at: float, request_id: str | None, n: int = 1) -> None:
        """`n`: the choices that were asked for."""
        self._called_at = called_at
        self._request_id = RequestId(request_id or "")
        self._n = n
        self._choices = {0: ChoiceTranscript(0)}
        self._ledger = Ledger()
        self._route = Route()
        self._ttft_s: float | None = None
        self._duration_s = 0.0
        self.attempts = 0

    @property
    def started(self) -> bool:
        """A chunk has arrived: the request must not be sent again."""
        return self._ttft_s is not None

    @property
    def finished(self) -> bool:
        """The last chunk of every choice has arrived."""
        return len(self._choices) == self._n and all(c.finished for c in self._choices.values())

    def accept(self, message: pb.GenerateChunk, now: float) -> Chunk | None:
        """Take one message; None when all of it had arrived before.

        Raises:
            InternalError: it is of a choice that nobody asked for, or does not follow what had arrived.
        """
        if self._ttft_s is None:
            self._begin(message, now)
        if message.choice >= self._n:
            raise InternalError(
                f"request {self._request_id!r}: a chunk of choice {message.choice} came, {self._n} were "
                "asked for; report this"
            )
        choice = self._choices.setdefault(message.choice, ChoiceTranscript(message.choice))
        piece = choice.accept(convert.chunk(message))
        if piece is None:
            return None
        self._duration_s = now - self._called_at
        if message.HasField("usage"):
            choice.usage = convert.usage(message.usage)
        return piece

    def partial(self) -> Partial:
        """What is known so far."""
        choices = self._arrived()
        return Partial(
            request_id=self._request_id,
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            choices=choices,
            ledger=self._ledger,
            route=self._route,
            ttft_s=self._ttft_s,
            attempts=self.attempts,
        )

    def result(self) -> Result:
        """The whole completion. Raises InternalError before the last chunk."""
        choices = self._arrived()
        first, usages = choices[0], self._usages()
        if first.finish_reason is None or self._ttft_s is None or not self.finished or len(usages) < self._n:
            arrived = sum(len(choice.token_ids) for choice in choices)
            raise InternalError(
                f"request {self._request_id!r} has no result: {arrived} tokens arrived, but not every "
                "choice's chunk with finish_reason and usage; read the stream to its end first"
            )
        return Result(
            request_id=self._request_id,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            choices=choices,
            usage=Usage(
                prompt_tokens=usages[0].prompt_tokens,
                completion_tokens=sum(usage.completion_tokens for usage in usages),
                cached_tokens=usages[0].cached_tokens,
            ),
            ledger=self._ledger,
            route=self._route,
            ttft_s=self._ttft_s,
            duration_s=self._duration_s,
            attempts=self.attempts,
        )

    def _arrived(self) -> tuple[Choice, ...]:
        """In order of index; choice 0 is always there."""
        return tuple(choice.choice() for _, choice in sorted(self._choices.items()))

    def _usages(self) -> list[Usage]:
        ordered = (choice for _, choice in sorted(self._choices.items()))
        return [choice.usage for choice in ordered if choice.usage is not None]

    def _begin(self, message: pb.GenerateChunk, now: float) -> None:
        self._ttft_s = now - self._called_at
        self._request_id = RequestId(message.request_id or self._request_id)
        self._ledger = convert.ledger(message.ledger).close(self._ttft_s)
        self._route = convert.route(message.route)
