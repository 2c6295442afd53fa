"""What has arrived of one completion: order checked, duplicates dropped, ledger closed. No I/O."""

from dataclasses import replace

from pdserve.client import convert
from pdserve.client.values import Chunk, Partial, Result, Route
from pdserve.core.errors import InternalError
from pdserve.core.lifecycle import Ledger
from pdserve.core.types import FinishReason, RequestId, Usage
from pdserve.proto import inference_pb2 as pb


class Transcript:
    """Chunks in, Result out. Times are seconds on the caller's one clock."""

    def __init__(self, called_at: float, request_id: str | None) -> None:
        self._called_at = called_at
        self._request_id = RequestId(request_id or "")
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None
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
        """The last chunk has arrived."""
        return self._finish_reason is not None

    def accept(self, message: pb.GenerateChunk, now: float) -> Chunk | None:
        """Take one message; None when all of it had arrived before.

        Raises:
            InternalError: tokens are missing, or overlap in a way that would cut text in two.
        """
        if self._ttft_s is None:
            self._begin(message, now)
        piece = self._fresh(convert.chunk(message))
        if piece is None:
            return None
        self._texts.append(piece.text)
        self._token_ids.extend(piece.token_ids)
        self._duration_s = now - self._called_at
        if message.HasField("usage"):
            self._usage = convert.usage(message.usage)
        self._finish_reason = piece.finish_reason
        return piece

    def partial(self) -> Partial:
        """What is known so far."""
        return Partial(
            request_id=self._request_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            ledger=self._ledger,
            route=self._route,
            ttft_s=self._ttft_s,
            attempts=self.attempts,
        )

    def result(self) -> Result:
        """The whole completion. Raises InternalError before the last chunk."""
        if self._finish_reason is None or self._usage is None or self._ttft_s is None:
            raise InternalError(
                f"request {self._request_id!r} has no result: {len(self._token_ids)} tokens arrived, "
                "but no chunk with finish_reason and usage; read the stream to its end first"
            )
        return Result(
            request_id=self._request_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            usage=self._usage,
            ledger=self._ledger,
            route=self._route,
            ttft_s=self._ttft_s,
            duration_s=self._duration_s,
            attempts=self.attempts,
        )

    def _begin(self, message: pb.GenerateChunk, now: float) -> None:
        self._ttft_s = now - self._called_at
        self._request_id = RequestId(message.request_id or self._request_id)
        self._ledger = convert.ledger(message.ledger).close(self._ttft_s)
        self._route = convert.route(message.route)

    def _fresh(self, piece: Chunk) -> Chunk | None:
        """The part of `piece` that is new: all, nothing, or only that the completion ended."""
        have = len(self._token_ids)
        end = piece.first_index + len(piece.token_ids)
        if self.finished:
            if end > have:
                raise InternalError(f"request {self._request_id!r}: tokens after its last chunk; report this")
            return None
        if not piece.token_ids or piece.first_index == have:
            return piece
        if end > have:
            raise InternalError(
                f"request {self._request_id!r}: a chunk with tokens {piece.first_index} to {end - 1} came "
                f"when {have} had arrived; tokens are missing or doubled, report this"
            )
        if piece.finish_reason is None:
            return None
        return replace(piece, text="", token_ids=(), first_index=have)
