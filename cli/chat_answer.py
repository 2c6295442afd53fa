"""One answer of a chat: streamed, cancelled by Ctrl-C, explained where it ended early."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.cli.answer_text import write_answer
from pdserve.core.errors import InvalidRequest, PdserveError
from pdserve.core.types import FinishReason

if TYPE_CHECKING:
    from pdserve.cli.chat_conversation import Message
    from pdserve.client import Client, ModelInfo, Partial, RequestOptions, Result


@dataclass(frozen=True, slots=True)
class Answer:
    """How one answer went. At most one of `error` and `cancelled` is set; without either it is complete."""

    text: str
    """What the user saw of it."""
    notes: tuple[str, ...] = ()
    """What the user should know of its end, one line each."""
    error: PdserveError | None = None
    cancelled: bool = False

    @property
    def counts(self) -> bool:
        """It is a turn of the conversation: complete, or cut short after its first text."""
        return bool(self.text) or (self.error is None and not self.cancelled)


class Answerer:
    """Asks one model of a cluster and prints what it says."""

    def __init__(self, client: "Client", model: "ModelInfo", *, stats: bool) -> None:
        self._client = client
        self._model = model
        self._stats = stats

    def ask(self, messages: "Sequence[Message]", options: "RequestOptions") -> Answer:
        """Stream one answer. Ctrl-C and errors end it; neither is raised."""
        options = options.copy()
        options["messages"] = messages
        options["model"] = self._model.name
        said: list[str] = []
        try:
            with self._client.generate(stream=True, **options) as stream:
                try:
                    for chunk in stream:
                        said.append(chunk.text)
                        write_answer(chunk.text)
                except KeyboardInterrupt:
                    stats = [arrived(stream.partial)] if self._stats and said else []
                    return Answer("".join(said), ("(cancelled)", *stats), cancelled=True)
                finally:
                    if said:
                        write_answer("\n")
                result = stream.result()
        except KeyboardInterrupt:  # before the first chunk was waited for, or after the last one
            return Answer("".join(said), ("(cancelled)",), cancelled=True)
        except PdserveError as error:
            return Answer("".join(said), self._explain(error, messages, options), error=error)
        return Answer("".join(said), tuple(self._remarks(result)))

    def _remarks(self, result: "Result") -> "list[str]":
        remarks = []
        if result.finish_reason is FinishReason.LENGTH:
            usage, context = result.usage, self._model.context_tokens
            used = usage.prompt_tokens + usage.completion_tokens
            why = f"stopped after {usage.completion_tokens} tokens, max_tokens allows no more"
            if used >= context:
                why = f"the context is full: {used} of {context} tokens; /reset begins a new conversation"
            remarks.append(f"({why})")
        if self._stats:
            remarks.append(figures(result))
        return remarks

    def _explain(
        self, error: PdserveError, messages: "Sequence[Message]", options: "RequestOptions"
    ) -> tuple[str, ...]:
        """A hint where the conversation has outgrown the context; the error alone cannot know /reset."""
        if not isinstance(error, InvalidRequest):
            return ()
        try:
            tokens = len(self._client.tokenize(messages=messages, model=self._model.name))
        except PdserveError:
            return ()
        wanted, context = options.get("max_tokens") or 1, self._model.context_tokens
        if tokens + wanted <= context:
            return ()
        return (
            f"the conversation has {tokens} tokens, the answer wants {wanted}, the context holds {context}: "
            "/reset begins a new conversation, /params max_tokens=N asks for less",
        )


def figures(result: "Result") -> str:
    """One line: counts, speed, and who did what."""
    usage = result.usage
    after_first_s = result.duration_s - result.ttft_s
    rate = f"{(usage.completion_tokens - 1) / after_first_s:.1f} tokens/s, " if after_first_s > 0 else ""
    return (
        f"[{usage.prompt_tokens} tokens in, {usage.cached_tokens} of them cached; "
        f"{usage.completion_tokens} out; {rate}{_way(result)}]"
    )


def arrived(partial: "Partial") -> str:
    """The same for an answer that has not ended."""
    return f"[{len(partial.token_ids)} tokens out; {_way(partial)}]"


def _way(served: "Result | Partial") -> str:
    route = served.route
    moved = f"{route.blocks_moved} blocks over {route.transport}" if route.transport else "nothing moved"
    first = "" if served.ttft_s is None else f"first token after {served.ttft_s * 1e3:.0f} ms; "
    return f"{first}prefill {route.prefill_worker}, decode {route.decode_worker}, {moved}"
