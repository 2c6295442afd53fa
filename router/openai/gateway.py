"""What the HTTP API stands on: the intake, the tokenizers and the limits of its router."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pdserve.core.errors import InvalidRequest
from pdserve.proto import inference_pb2 as pb
from pdserve.router.metered_intake import MeteredIntake
from pdserve.router.openai.generation import Generation
from pdserve.router.openai.heading import Heading
from pdserve.router.openai.logprobs import Decodes, TokenTexts


@dataclass(frozen=True, slots=True)
class Gateway:
    """One per router."""

    intake: MeteredIntake
    tokenizers: Mapping[str, Decodes]
    """By model."""
    texts: Mapping[str, TokenTexts]
    """Of the same tokenizers."""
    max_body_bytes: int
    max_prompts: int
    """Of one request."""

    def heading(self, prefix: str, model: str | None) -> Heading:
        """A new name; the model that is meant where none was named."""
        listed = self.intake.models().models
        served = model or (listed[0].name if len(listed) == 1 else "")
        return Heading(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), served)

    def request(
        self, heading: Heading, number: int, of: int, sampling: pb.Sampling, prompt: pb.GenerateRequest
    ) -> pb.GenerateRequest:
        """`prompt` with all that the intake needs; prompts of a batch have names of their own."""
        prompt.request_id = heading.id if of == 1 else f"{heading.id}-{number}"
        prompt.model = heading.model
        prompt.sampling.CopyFrom(sampling)
        return prompt

    def generation(self, requests: Sequence[pb.GenerateRequest], timeout_s: float | None) -> Generation:
        return Generation(self.intake, requests, timeout_s)

    def token_texts(self, model: str) -> TokenTexts:
        return self.texts.get(model) or TokenTexts(None)

    def decode(self, model: str, ids: Iterable[int]) -> str:
        """Text of token ids. Raises InvalidRequest where the model has no tokenizer here, or no such id."""
        tokenizer = self.tokenizers.get(model)
        if tokenizer is None:
            raise InvalidRequest(f"this router has no tokenizer for model {model!r}: leave out echo")
        return tokenizer.decode(ids, skip_special=False)
