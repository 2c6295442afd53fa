"""`POST /v1/completions`: from its fields to generation requests, and from chunks to its answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as quote
from typing import Any

from starlette.responses import Response

from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.answers import EventAnswer, WholeAnswer
from pdserve.router.openai.completion_schema import DEFAULT_MAX_TOKENS, CompletionRequest
from pdserve.router.openai.errors import BadField
from pdserve.router.openai.gateway import Gateway
from pdserve.router.openai.heading import Heading
from pdserve.router.openai.logprobs import CompletionLogprobs
from pdserve.router.openai.sampling import to_sampling

OBJECT = "text_completion"


def answer_completion(gateway: Gateway, fields: CompletionRequest) -> Response:
    """Raises InvalidRequest for what can be told before anything runs."""
    _check(fields)
    asked = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    sampling = to_sampling(fields, max_tokens=asked, logprobs=fields.logprobs)
    prompts = prompts_of(fields.prompt)
    if len(prompts) > gateway.max_prompts:
        raise BadField(
            "prompt", f"prompt has {len(prompts)} prompts, the limit is {gateway.max_prompts}: send fewer"
        )
    heading = gateway.heading("cmpl", fields.model)
    requests = [
        gateway.request(heading, number, len(prompts), sampling, prompt)
        for number, prompt in enumerate(prompts)
    ]
    generation = gateway.generation(requests, fields.timeout)
    echoes = [_echo(gateway, heading.model, prompt) for prompt in prompts] if fields.echo else None
    form = _Form(gateway, heading, fields.n or 1, fields.logprobs is not None, echoes)
    if fields.stream:
        usage = bool(fields.stream_options and fields.stream_options.include_usage)
        return EventAnswer(generation, CompletionEvents(form, usage), heading.id)
    return WholeAnswer(generation, CompletionWhole(form, len(prompts)), heading.id)


def prompts_of(prompt: Any) -> list[pb.GenerateRequest]:
    """One request with nothing but its prompt for each prompt."""
    if isinstance(prompt, str):
        return [pb.GenerateRequest(text=prompt)]
    if isinstance(prompt[0], int):
        return [pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt))]
    return [one for part in prompt for one in prompts_of(part)]


def _check(fields: CompletionRequest) -> None:
    if fields.suffix:
        raise BadField("suffix", "suffix is set: models here only continue, leave it out")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise BadField(
            "best_of", f"best_of is {fields.best_of}, n is {fields.n or 1}: only n choices are made, set n"
        )
    if fields.echo and fields.logprobs is not None:
        raise BadField(
            "echo", "echo and logprobs are both set: the prompt has no log probabilities here, leave out one"
        )


def _echo(gateway: Gateway, model: str, prompt: pb.GenerateRequest) -> str:
    if prompt.WhichOneof("prompt") == "text":
        return prompt.text
    return gateway.decode(model, prompt.token_ids.ids)


@dataclass(frozen=True, slots=True)
class _Form:
    """What both kinds of answers have to know."""

    gateway: Gateway
    heading: Heading
    n: int
    with_logprobs: bool
    echoes: Sequence[str] | None
    """By prompt."""

    def choice(self, prompt: int, chunk: pb.GenerateChunk) -> int:
        """Choices of all prompts are numbered through."""
        return prompt * self.n + chunk.choice

    def logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(self.gateway.token_texts(self.heading.model))


class CompletionEvents:
    """Events of a stream. What does not change between chunks is encoded once."""

    def __init__(self, form: _Form, include_usage: bool) -> None:
        self._form = form
        self._head = f"data: {form.heading.opening(OBJECT)},"
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._include_usage = include_usage
        self._echoed: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def event(self, prompt: int, chunk: pb.GenerateChunk) -> bytes:
        form = self._form
        index = form.choice(prompt, chunk)
        text = chunk.text
        if form.echoes is not None and index not in self._echoed:
            self._echoed.add(index)
            text = form.echoes[prompt] + text
        finish = f'"{chunk.finish_reason}"' if chunk.finish_reason else "null"
        logprobs = "null"
        if form.with_logprobs and chunk.logprobs:
            state = self._logprobs.setdefault(index, form.logprobs())
            logprobs = state.join([state.piece(chunk.logprobs)])
        choice = f'{{"index":{index},"text":{quote(text)},"logprobs":{logprobs},"finish_reason":{finish}}}'
        return f'{self._head}"choices":[{choice}{self._tail}'.encode()

    def usage_event(self, usage: Mapping[str, Any]) -> bytes:
        if not self._include_usage:
            return b""
        return f'{self._head}"choices":[],"usage":{json.dumps(usage)}}}\n\n'.encode()


class CompletionWhole:
    """The one answer without a stream."""

    def __init__(self, form: _Form, prompts: int) -> None:
        self._form = form
        count = prompts * form.n
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._reasons: list[str | None] = [None] * count
        self._logprobs = [form.logprobs() for _ in range(count)] if form.with_logprobs else []
        self._pieces: list[list[tuple[str, ...]]] = [[] for _ in self._logprobs]

    def add(self, prompt: int, chunk: pb.GenerateChunk) -> None:
        index = self._form.choice(prompt, chunk)
        self._texts[index].append(chunk.text)
        if chunk.finish_reason:
            self._reasons[index] = chunk.finish_reason
        if self._logprobs:
            self._pieces[index].append(self._logprobs[index].piece(chunk.logprobs))

    def answer(self, usage: Mapping[str, Any]) -> bytes:
        choices = ",".join(map(self._choice, range(len(self._texts))))
        head = self._form.heading.opening(OBJECT)
        return f'{head},"choices":[{choices}],"usage":{json.dumps(usage)}}}'.encode()

    def _choice(self, index: int) -> str:
        text = self._echo(index) + "".join(self._texts[index])
        logprobs = CompletionLogprobs.join(self._pieces[index]) if self._logprobs else "null"
        finish = json.dumps(self._reasons[index])
        return f'{{"index":{index},"text":{quote(text)},"logprobs":{logprobs},"finish_reason":{finish}}}'

    def _echo(self, index: int) -> str:
        echoes = self._form.echoes
        return "" if echoes is None else echoes[index // self._form.n]
