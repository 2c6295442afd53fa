"""What has arrived of one choice: order checked, duplicates dropped. No I/O."""

from dataclasses import replace

from pdserve.client.values import Choice, Chunk
from pdserve.core.errors import InternalError
from pdserve.core.types import FinishReason, TokenLogprobs, Usage


class ChoiceTranscript:
    """Chunks of one choice in, the choice out."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        """Of this choice alone; on its last chunk."""

    @property
    def finished(self) -> bool:
        """The choice's last chunk has arrived."""
        return self._finish_reason is not None

    def accept(self, piece: Chunk) -> Chunk | None:
        """The part of `piece` that is new: all, nothing, or only that the choice ended.

        Raises:
            InternalError: tokens are missing, or overlap in a way that would cut text in two.
        """
        fresh = self._fresh(piece)
        if fresh is not None:
            self._texts.append(fresh.text)
            self._token_ids.extend(fresh.token_ids)
            self._logprobs.extend(fresh.logprobs)
            self._finish_reason = fresh.finish_reason
        return fresh

    def choice(self) -> Choice:
        """What is known so far."""
        return Choice(
            index=self._index,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            logprobs=tuple(self._logprobs),
        )

    def _fresh(self, piece: Chunk) -> Chunk | None:
        have = len(self._token_ids)
        end = piece.first_index + len(piece.token_ids)
        if self.finished:
            if end > have:
                raise InternalError(
                    f"request {piece.request_id!r}: tokens after the last chunk of choice {self._index}; "
                    "report this"
                )
            return None
        if not piece.token_ids or piece.first_index == have:
            return piece
        if end > have:
            raise InternalError(
                f"request {piece.request_id!r}: a chunk with tokens {piece.first_index} to {end - 1} of "
                f"choice {self._index} came when {have} had arrived; tokens are missing or doubled: report "
                "this"
            )
        if piece.finish_reason is None:
            return None
        return replace(piece, text="", token_ids=(), logprobs=(), first_index=have)
