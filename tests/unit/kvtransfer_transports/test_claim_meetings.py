"""Grants that are served and claims for them, in any order: each claim gets a serve or a refusal."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest

from pdserve.core.types import HandoffId
from pdserve.kvtransfer.transports.meetings import GIVEN_UP, Key, Meetings

KEY = Key(HandoffId("h"), 1, 0)


@pytest.fixture
def refused() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def meetings(refused: list[tuple[str, str]]) -> Meetings[str]:
    return Meetings(60.0, lambda arrival, reason: refused.append((arrival, reason)))


@pytest.mark.parametrize("claim_first", [True, False])
async def test_a_grant_meets_its_claim_in_either_order(meetings: Meetings[str], claim_first: bool) -> None:
    if claim_first:
        meetings.claimed(KEY, "claim")
    serve = asyncio.ensure_future(meetings.serve(KEY))
    await asyncio.sleep(0)
    if not claim_first:
        meetings.claimed(KEY, "claim")
    assert await serve == "claim"


class Claim:
    """Something that can be seen to be forgotten."""


@pytest.mark.parametrize("claim_first", [True, False])
async def test_nothing_is_kept_of_a_claim_that_was_served(claim_first: bool) -> None:
    """A claim keeps its reader, with its buffers; readers come and go faster than claims expire."""
    meetings: Meetings[Claim] = Meetings(60.0, lambda arrival, reason: None)
    serve = None if claim_first else asyncio.ensure_future(meetings.serve(KEY))
    await asyncio.sleep(0)
    claim = Claim()
    kept = weakref.ref(claim)
    meetings.claimed(KEY, claim)
    del claim
    await (serve or asyncio.ensure_future(meetings.serve(KEY)))
    del serve
    await asyncio.sleep(0)  # this very turn of the loop was begun by what was awaited
    gc.collect()
    assert kept() is None


async def test_a_claim_that_nobody_serves_is_refused_in_time(
    meetings: Meetings[str],
    refused: list[tuple[str, str]],
    leap: Callable[[float], Awaitable[None]],
) -> None:
    meetings.claimed(KEY, "claim")
    await leap(59.0)
    assert not refused
    await leap(1.0)
    assert refused == [("claim", "no such grant was served within 60.0 s")]


async def test_a_claim_that_comes_as_its_serve_is_given_up_is_refused(
    meetings: Meetings[str], refused: list[tuple[str, str]]
) -> None:
    serve = asyncio.ensure_future(meetings.serve(KEY))
    await asyncio.sleep(0)
    meetings.claimed(KEY, "claim")
    serve.cancel()
    await asyncio.wait({serve})
    assert serve.cancelled()
    assert refused == [("claim", GIVEN_UP)]


async def test_a_claim_outlives_no_handoff(meetings: Meetings[str], refused: list[tuple[str, str]]) -> None:
    meetings.claimed(KEY, "claim")
    meetings.call_off("ended", KEY.handoff)
    assert refused == [("claim", "ended")]
