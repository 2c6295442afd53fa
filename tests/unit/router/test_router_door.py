"""The door: what is refused, with the limit in the message."""

import dataclasses

import pytest
from router_views import record

from pdserve.core.errors import ContextTooLong, InvalidRequest, Unavailable, UnknownModel
from pdserve.core.request_limits import check_sampling, check_tokens, promise_blocks
from pdserve.core.text.chat_template import ChatMessage
from pdserve.core.types import Role, SamplingParams
from pdserve.router import validation
from pdserve.router.pools import any_per_model, pool_of
from pdserve.router.prompt import Chat, Prompt, TokenIds
from pdserve.router.validation import Limits

LIMITS = Limits(context_tokens=100, vocab_size=512, decode_blocks=8, every_decode_blocks=8, prefill_blocks=5)


@pytest.mark.parametrize("prompt", [None, "", Chat(()), TokenIds(())])
def test_an_empty_prompt_is_refused(prompt: Prompt | None) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        validation.check_prompt(prompt, 100)


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 11,
        TokenIds((1, 2, 3)),
        Chat((ChatMessage("user", "é" * 4),)),
        Chat((ChatMessage("tool", "", tool_call_id="12345678"),)),
    ],
)
def test_a_prompt_past_the_limit_names_both_numbers(prompt: Prompt) -> None:
    with pytest.raises(ContextTooLong, match=r"1[12] bytes, the limit is 10"):
        validation.check_prompt(prompt, 10)


def test_tokens_are_checked_against_the_vocabulary() -> None:
    check_tokens([0, 511], 512)
    with pytest.raises(InvalidRequest, match=r"512.*0 to 511"):
        check_tokens([1, 512], 512)
    with pytest.raises(InvalidRequest, match="no tokens"):
        check_tokens([], 512)


def test_models_are_listed_when_another_is_asked_for() -> None:
    assert validation.check_model("", ["a"]) == "a"
    assert validation.check_model("b", ["a", "b"]) == "b"
    with pytest.raises(UnknownModel, match="a, b"):
        validation.check_model("c", ["b", "a"])
    with pytest.raises(UnknownModel, match="a, b"):
        validation.check_model("", ["b", "a"])


def test_the_default_completion_shrinks_to_the_context() -> None:
    default = SamplingParams()
    assert validation.bound_completion(default, False, 90, LIMITS).max_tokens == 10
    assert validation.bound_completion(SamplingParams(max_tokens=10), True, 90, LIMITS).max_tokens == 10


@pytest.mark.parametrize(("prompt", "asked"), [(91, True), (100, False), (101, False)])
def test_past_the_context_the_request_is_refused(prompt: int, asked: bool) -> None:
    with pytest.raises(ContextTooLong, match=rf"{prompt} \+ .*100"):
        validation.bound_completion(SamplingParams(max_tokens=10), asked, prompt, LIMITS)


def test_a_completion_past_the_decode_pool_is_refused_with_both_numbers() -> None:
    roomy = dataclasses.replace(LIMITS, context_tokens=1000)
    fits = validation.bound_completion(SamplingParams(max_tokens=49), True, 80, roomy)
    assert fits.max_tokens == 49  # the KV of the last token is never needed: 128 positions
    with pytest.raises(ContextTooLong, match=r"80 \+ 50 tokens.*8 blocks of 16"):
        validation.bound_completion(SamplingParams(max_tokens=50), True, 80, roomy)
    assert validation.bound_completion(SamplingParams(), False, 80, roomy).max_tokens == 49


def test_an_answer_in_a_chat_may_fill_what_context_and_pools_leave() -> None:
    chat = validation.default_completion(SamplingParams(min_tokens=300), Chat((ChatMessage("user", "hi"),)))
    check_sampling(chat)
    assert validation.default_completion(SamplingParams(), "hi") == SamplingParams()
    large = Limits(
        context_tokens=1000, vocab_size=512, decode_blocks=32, every_decode_blocks=32, prefill_blocks=None
    )
    assert validation.bound_completion(chat, False, 100, large).max_tokens == 413
    in_context = dataclasses.replace(large, decode_blocks=99, every_decode_blocks=99)
    assert validation.bound_completion(chat, False, 100, in_context).max_tokens == 900


def test_a_default_completion_fits_every_pool_where_these_have_room_for_an_answer() -> None:
    chat = validation.default_completion(SamplingParams(), Chat((ChatMessage("user", "hi"),)))
    mixed = Limits(
        context_tokens=9000, vocab_size=512, decode_blocks=64, every_decode_blocks=16, prefill_blocks=None
    )
    assert validation.bound_completion(chat, False, 129, mixed).max_tokens == 128
    assert validation.bound_completion(chat, False, 130, mixed).max_tokens == 895


def test_a_default_completion_that_cannot_reach_min_tokens_is_refused() -> None:
    assert validation.bound_completion(SamplingParams(min_tokens=10), False, 90, LIMITS).max_tokens == 10
    with pytest.raises(ContextTooLong, match=r"90 \+ 11 tokens, the context has 100"):
        validation.bound_completion(SamplingParams(min_tokens=11), False, 90, LIMITS)


def test_choices_that_no_decode_pool_can_promise_together_are_refused_with_both_numbers() -> None:
    validation.check_promise(8, 4, LIMITS)
    with pytest.raises(ContextTooLong, match=r"4 choices needs a promise of 9 blocks.*has 8 blocks"):
        validation.check_promise(9, 4, LIMITS)


def test_a_prompt_that_fits_no_prefill_pool_is_refused_with_both_numbers() -> None:
    validation.check_prefill(81, LIMITS)
    with pytest.raises(ContextTooLong, match=r"6 blocks to prefill.*5 blocks"):
        validation.check_prefill(82, LIMITS)


def test_a_promise_covers_the_prompt_and_the_headroom_at_most() -> None:
    assert promise_blocks(16, 1000, 32) == 3
    assert promise_blocks(16, 4, 32) == 2
    assert promise_blocks(16, 1, 32) == 1


@pytest.mark.parametrize("name", ["x" * 129, "a\nb"])
def test_odd_request_ids_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="request_id"):
        validation.check_request_id(name)


def test_limits_are_those_of_the_largest_pool_of_each_kind() -> None:
    limits = Limits.of(
        [
            record("p", Role.PREFILL, pool_blocks=7),
            record("d", Role.DECODE, pool_blocks=9),
            record("e", Role.DECODE, pool_blocks=5),
        ]
    )
    assert (limits.prefill_blocks, limits.decode_blocks, limits.every_decode_blocks) == (7, 9, 5)
    assert Limits.of([record("d", Role.DECODE)]).prefill_blocks is None


def test_schemas_never_mix_in_a_pool() -> None:
    old = [record("p0", Role.PREFILL), record("d0", Role.DECODE)]
    new = [record(name, Role.DECODE, schema="11" * 16) for name in ("d1", "d2")]
    assert {worker.worker for worker in pool_of([*old, *new], "tiny")} == {"d1", "d2"}
    assert {worker.worker for worker in pool_of([*old, new[0]], "tiny")} == {"p0", "d0"}


def test_a_pool_without_an_owner_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="has joined"):
        pool_of([], "tiny")
    with pytest.raises(Unavailable, match=r"p \(prefill\), d \(draining\)"):
        pool_of([record("p", Role.PREFILL), record("d", Role.DECODE, draining=True)], "tiny")


def test_each_model_is_described_once() -> None:
    described = any_per_model([record("a", Role.MIXED), record("b", Role.MIXED)])
    assert {model: found.worker for model, found in described.items()} == {"tiny": "a"}
