"""Grants that are served and claims for them, in any order: each claim gets a serve or a refusal."""

import asyncio

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
