"""Sampling parameters on the wire and in core: the one file that knows both."""

import secrets
from collections.abc import Iterable

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind, SamplingParams, TokenLogprobs
from pdserve.proto import inference_pb2 as pb

_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "logprobs",
)


def decode(message: pb.Sampling) -> SamplingParams:
    """Absent fields take their defaults, an absent seed is drawn. Ranges are not checked here.

    Raises InvalidRequest for a kind of constraint that does not exist.
    """
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    if "seed" not in given:
        given["seed"] = secrets.randbits(63)
    return SamplingParams(
        ignore_eos=message.ignore_eos,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        constraint=_constraint(message.constraint) if message.HasField("constraint") else None,
        **given,
    )


def encode(sampling: SamplingParams) -> pb.Sampling:
    """Every field set: what is sent on does not depend on the receiver's defaults.

    Raises ValueError for what no field can hold, such as a negative count.
    """
    message = pb.Sampling(
        **{name: getattr(sampling, name) for name in _OPTIONAL},
        ignore_eos=sampling.ignore_eos,
        logit_bias=dict(sampling.logit_bias),
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
    )
    if sampling.constraint is not None:
        message.constraint.kind = sampling.constraint.kind
        message.constraint.source = sampling.constraint.source
    return message


def encode_logprobs(positions: Iterable[TokenLogprobs]) -> list[pb.PositionLogprobs]:
    """One message per position."""
    return [
        pb.PositionLogprobs(
            sampled=pb.TokenLogprob(token_id=position.token_id, logprob=position.logprob),
            rank=position.rank,
            top=[pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in position.top],
        )
        for position in positions
    ]


def decode_logprobs(positions: Iterable[pb.PositionLogprobs]) -> tuple[TokenLogprobs, ...]:
    """The inverse of `encode_logprobs`, at float32."""
    return tuple(
        TokenLogprobs(
            token_id=position.sampled.token_id,
            logprob=position.sampled.logprob,
            rank=position.rank,
            top=tuple((entry.token_id, entry.logprob) for entry in position.top),
        )
        for position in positions
    )


def _constraint(message: pb.Constraint) -> Constraint:
    try:
        return Constraint(ConstraintKind(message.kind), message.source)
    except ValueError as error:
        kinds = ", ".join(ConstraintKind)
        raise InvalidRequest(f"constraint.kind is {message.kind!r}: it must be one of {kinds}") from error
