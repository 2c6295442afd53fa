"""The table of bad input: what is sent, over which API, and what has to come back."""

import json
from dataclasses import dataclass
from typing import Any

from grpc import StatusCode

from pdserve.proto import inference_pb2 as pb

CONTEXT_TOKENS = 2048
VOCABULARY = 257
PREFILL_BLOCKS = 24
DECODE_BLOCKS = 64
MAX_PROMPT_BYTES = 8192
MAX_BODY_BYTES = 256 * 1024

INVALID = StatusCode.INVALID_ARGUMENT


@dataclass(frozen=True)
class Bad:
    """One row. A None where the input cannot be said over that API."""

    name: str
    grpc: bytes | None
    http: bytes | None
    says: str
    """Part of the message, as a regular expression."""
    code: StatusCode = INVALID
    status: int = 400
    http_says: str | None = None
    """Where the gateway's own parser finds it first, in its own words."""


def message(text: str = "a prompt", *, model: str = "", **sampling: Any) -> bytes:
    """A GenerateRequest on the wire."""
    request = pb.GenerateRequest(model=model, text=text, sampling=pb.Sampling(**sampling))
    return request.SerializeToString()


def body(prompt: Any = "a prompt", **fields: Any) -> bytes:
    """A request to /v1/completions."""
    return json.dumps({"prompt": prompt, "max_tokens": 4, **fields}).encode()


def ids(*token_ids: int) -> bytes:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))
    return request.SerializeToString()


def constrained(kind: str, source: str, **more: Any) -> bytes:
    return message(constraint=pb.Constraint(kind=kind, source=source), **more)


def out_of_range(name: str, value: Any, says: str, **changes: Any) -> Bad:
    """One sampling value, the same over both."""
    return Bad(f"{name}={value}", message(**{name: value}), body(**{name: value}), says, **changes)


NAN = float("nan")
TEN_THOUSAND = [f"stop {number}" for number in range(10_000)]
BAD_SCHEMA = '{"type": "no such type"}'

PROMPTS = (
    Bad("empty prompt", message(""), body(""), "prompt is empty", http_says="prompt"),
    Bad("no prompt", pb.GenerateRequest().SerializeToString(), b"{}", "prompt is empty", http_says="prompt"),
    Bad("empty id list", ids(), body([]), "prompt is empty", http_says="prompt"),
    Bad(
        "unknown token id",
        ids(1, VOCABULARY),
        body([1, VOCABULARY]),
        f"token id {VOCABULARY} is out of the vocabulary: ids go from 0 to {VOCABULARY - 1}",
    ),
    Bad(
        "more bytes than a prompt may have",
        message("x" * 9000),
        body("x" * 9000),
        f"9000 bytes, the limit is {MAX_PROMPT_BYTES}",
    ),
    Bad(
        "beyond the context",
        message("x" * 10, max_tokens=CONTEXT_TOKENS),
        body("x" * 10, max_tokens=CONTEXT_TOKENS),
        f"10 \\+ {CONTEXT_TOKENS} tokens, the context has {CONTEXT_TOKENS}",
    ),
    Bad(
        "beyond the decode pool",
        message("x" * 10, max_tokens=1100),
        body("x" * 10, max_tokens=1100),
        f"10 \\+ 1100 tokens, the largest decode pool has {DECODE_BLOCKS} blocks",
    ),
    Bad(
        "beyond the prefill pool",
        message("x" * 500, max_tokens=4),
        body("x" * 500),
        f"500 tokens needs 32 blocks to prefill, the largest prefill pool has {PREFILL_BLOCKS} blocks",
    ),
    Bad(
        "choices beyond the decode pool",
        message("x" * 100, max_tokens=100, n=16),
        body("x" * 100, max_tokens=100, n=16),
        f"16 choices needs a promise of 86 blocks, the largest decode pool has {DECODE_BLOCKS} blocks",
    ),
    Bad(
        "unknown model",
        message(model="gpt-17"),
        body(model="gpt-17"),
        "model 'gpt-17' is not served here: served are ",
        StatusCode.NOT_FOUND,
        404,
    ),
)

VALUES = (
    out_of_range("max_tokens", 0, "max_tokens is 0: it must be at least 1"),
    out_of_range("temperature", -0.5, "temperature is -0.5: it must be from 0 to 100"),
    out_of_range("temperature", 101.0, "temperature is 101: it must be from 0 to 100"),
    out_of_range("temperature", NAN, "temperature is nan", http_says="temperature|not JSON"),
    out_of_range("temperature", float("inf"), "temperature is inf", http_says="temperature|not JSON"),
    out_of_range("top_p", 0.0, "top_p is 0: it must be above 0 to 1"),
    out_of_range("top_p", 1.5, "top_p is 1.5"),
    Bad("top_k=-2", None, body(top_k=-2), "top_k: .*greater than or equal to -1"),
    out_of_range("min_p", -0.5, "min_p is -0.5: it must be from 0 to 1"),
    out_of_range("min_p", 1.5, "min_p is 1.5"),
    out_of_range("n", 0, "n is 0: it must be from 1 to 128"),
    out_of_range("n", 129, "n is 129"),
    out_of_range("repetition_penalty", 0.0, "repetition_penalty is 0: it must be from 0.01 to 100"),
    out_of_range("repetition_penalty", NAN, "is nan", http_says="repetition_penalty|not JSON"),
    out_of_range("presence_penalty", 2.5, "presence_penalty is 2.5: it must be from -2 to 2"),
    out_of_range("frequency_penalty", -2.5, "frequency_penalty is -2.5: it must be from -2 to 2"),
    out_of_range("logprobs", 21, "logprobs is 21: it must be from 0 to 20", http_says="logprobs"),
    out_of_range("min_tokens", 500, "min_tokens is 500, max_tokens (128|4)"),
    Bad(
        "logit_bias too strong",
        message(logit_bias={3: 101.0}),
        body(logit_bias={"3": 101}),
        "logit_bias of token 3 is 101: it must be from -100 to 100",
        http_says="logit_bias",
    ),
    Bad(
        "logit_bias of an unknown token",
        message(logit_bias={VOCABULARY: 1.0}),
        body(logit_bias={str(VOCABULARY): 1}),
        f"logit_bias has token id {VOCABULARY}, out of the vocabulary",
    ),
    Bad(
        "logit_bias of too many tokens",
        message(logit_bias=dict.fromkeys(range(1025), 1.0)),
        body(logit_bias={str(token): 1 for token in range(1025)}),
        "logit_bias has 1025 entries, the limit is 1024",
        http_says="logit_bias: .*1024",
    ),
    Bad("stop=''", message(stop=[""]), body(stop=[""]), r"stop\[0\] is empty", http_says="stop"),
    Bad(
        "a long stop",
        message(stop=["x" * 1025]),
        body(stop="x" * 1025),
        r"stop\[0\] has 1025 bytes, the limit is 1024",
    ),
    Bad(
        "10,000 stop strings",
        message(stop=TEN_THOUSAND),
        body(stop=TEN_THOUSAND),
        "stop has 10000 entries, the limit is 64",
        http_says="stop.*64.*10000",
    ),
    Bad(
        "an unknown stop token",
        message(stop_token_ids=[VOCABULARY]),
        body(stop_token_ids=[VOCABULARY]),
        f"stop_token_ids has token id {VOCABULARY}, out of the vocabulary",
    ),
    Bad("seed=2^64", None, body(seed=2**64), "seed"),
)

CONSTRAINTS = (
    Bad(
        "a schema that cannot be compiled",
        constrained("json_schema", BAD_SCHEMA),
        body(guided_json=json.loads(BAD_SCHEMA)),
        "json_schema",
    ),
    Bad("a schema that is no JSON", constrained("json_schema", "{"), body(guided_json="{"), "JSON|json"),
    Bad("a broken expression", constrained("regex", "a("), body(guided_regex="a("), "regex"),
    Bad("a broken grammar", constrained("grammar", "start: ("), body(guided_grammar="start: ("), "grammar"),
    Bad("no choices", constrained("choice", "[]"), body(guided_choice=[]), "choice"),
    Bad("an unknown kind", constrained("haiku", ""), None, "constraint.kind is 'haiku': it must be one of"),
    Bad(
        "a constraint that may not end",
        constrained("regex", "a", ignore_eos=True),
        body(guided_regex="a", ignore_eos=True),
        "leave out ignore_eos or the constraint",
    ),
    Bad(
        "a constraint of too many bytes",
        constrained("regex", "a" * 65_537),
        body(guided_regex="a" * 65_537),
        "has 65537 bytes, the limit is 8192",
    ),
)

BYTES = (
    Bad("invalid UTF-8", b"\x1a\x02\xff\xfe", b'{"prompt": "\xff\xfe"}', "UTF-8", http_says="JSON|UTF-8"),
    Bad("a lone surrogate", None, b'{"prompt": "\\ud800"}', "prompt|surrogate|JSON"),
    Bad("no message at all", b"\xff\xff\xff", b"", "cannot be read", http_says="JSON"),
    Bad("malformed JSON", None, b'{"prompt": "a",}', "not JSON"),
    Bad("JSON that is no object", None, b"[1]", "object"),
    Bad("a text for a number", None, body(max_tokens="many"), "max_tokens: it must be .*integer"),
    Bad("a number for a prompt", None, body(7), "prompt"),
    Bad("ids among texts", None, body(["a", 1]), "prompt"),
    Bad("a negative token id", None, body([1, -1]), "prompt"),
    Bad(
        "an oversized body",
        None,
        body("x" * MAX_BODY_BYTES),
        f"bytes, the limit is {MAX_BODY_BYTES}",
        status=413,
    ),
    Bad(
        "an oversized message",
        message("x" * (17 * 1024 * 1024)),
        None,
        "larger than max",
        StatusCode.RESOURCE_EXHAUSTED,
    ),
)

TABLE = (*PROMPTS, *VALUES, *CONSTRAINTS, *BYTES)
