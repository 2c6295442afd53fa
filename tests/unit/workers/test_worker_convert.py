"""An Open is understood whole, or refused as the sender's fault."""

from typing import Any

import pytest

from pdserve.core.clock import ManualClock
from pdserve.core.errors import ContextTooLong, InvalidRequest
from pdserve.core.types import Incarnation, RequestId, SamplingParams, WorkerId
from pdserve.kvtransfer.handoff.ask import HandoffPeer, PrefixHolder
from pdserve.kvtransfer.names import chain, pack_chain, pack_tokens
from pdserve.proto import handoff_pb2, worker_pb2
from pdserve.workers.convert import decode_ask
from pdserve.workers.decode_limits import DecodeLimits
from pdserve.workers.decode_request import DecodeAsk, PrefillCandidate

ROOT = b"n" * 16
TOKENS = tuple(range(40))


def message(**changes: Any) -> worker_pb2.OpenRequest:
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": pack_tokens(TOKENS),
        "chain": pack_chain(chain(ROOT, TOKENS)),
        "namespace": ROOT,
        "candidates": [worker_pb2.Candidate(worker="p", incarnation="i", endpoint="h:1")],
    }
    return worker_pb2.OpenRequest(**{**fields, **changes})


def test_an_open_becomes_an_ask_with_the_deadline_on_the_own_clock() -> None:
    opened = message(remaining_s=2.5)
    opened.sampling.seed = 7
    ask = decode_ask(opened, ManualClock(100.0))
    assert ask == DecodeAsk(
        request_id=RequestId("r"),
        token_ids=TOKENS,
        chain=chain(ROOT, TOKENS),
        namespace=ROOT,
        sampling=SamplingParams(seed=7),  # what is absent takes the defaults
        candidates=(PrefillCandidate("p", "i", "h:1"),),
        deadline=102.5,
    )


def test_a_prefix_holder_is_optional() -> None:
    named = handoff_pb2.PrefixHolder(worker="d", incarnation="i", endpoint="h:2", blocks=7)
    ask = decode_ask(message(prefix=named), ManualClock())
    assert ask.prefix == PrefixHolder(HandoffPeer(WorkerId("d"), Incarnation("i"), "h:2"), 7)
    assert decode_ask(message(), ManualClock()).prefix is None


def test_names_that_are_not_sent_are_derived_and_no_remaining_time_is_no_deadline() -> None:
    ask = decode_ask(message(chain=b""), ManualClock())
    assert ask.chain == chain(ROOT, TOKENS)
    assert ask.deadline is None


@pytest.mark.parametrize(
    "changes",
    [
        {"chain": b"x" * 33},
        {"chain": b"x" * 16},
        {"chain": b"x" * 48},
        {"prompt_token_ids": b"123"},
        {"prompt_token_ids": b"", "chain": b""},
        {"request_id": ""},
        {"remaining_s": float("inf")},
        {"remaining_s": float("nan")},
    ],
)
def test_what_is_not_understood_is_the_senders_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        decode_ask(message(**changes), ManualClock())


def ask(tokens: tuple[int, ...] = TOKENS, **sampling: Any) -> DecodeAsk:
    params = SamplingParams(**{"max_tokens": 9, **sampling})
    return DecodeAsk(RequestId("r"), tokens, chain(ROOT, tokens), ROOT, params, (), None)


LIMITS = DecodeLimits(vocab_size=100, context_tokens=64, pool_blocks=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"tokens": (1, 100)},
    ],
)
def test_what_could_fail_a_step_of_others_is_refused_at_the_door(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        LIMITS.check(ask(**wrong))


def test_what_fits_exactly_is_taken_and_one_token_more_is_refused_with_both_numbers() -> None:
    LIMITS.check(ask(max_tokens=9))  # 40 + 8 positions: the last token's KV is never needed
    with pytest.raises(ContextTooLong, match=r"need 4 KV blocks, .* has 3"):
        LIMITS.check(ask(max_tokens=10))
    with pytest.raises(ContextTooLong, match=r"need 65 positions, the model has 64"):
        LIMITS.check(ask(max_tokens=26))
