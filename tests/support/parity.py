"""Runs prompts through a deployment and compares every token with the references."""

import asyncio
from collections.abc import Sequence

from references import Reference

from pdserve.client import AsyncClient, Result

IN_FLIGHT = 16


async def one_at_a_time(client: AsyncClient, cases: Sequence[Reference], tokens: int) -> list[Result]:
    return [await _greedy(client, case, tokens) for case in cases]


async def in_flight(client: AsyncClient, cases: Sequence[Reference], tokens: int) -> list[Result]:
    """All cases, at most IN_FLIGHT at once, answers in the order of the cases."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def gated(case: Reference) -> Result:
        async with gate:
            return await _greedy(client, case, tokens)

    return list(await asyncio.gather(*(gated(case) for case in cases)))


async def sampled(client: AsyncClient, cases: Sequence[Reference], tokens: int) -> list[tuple[int, ...]]:
    """Seeded sampling at temperature 0.8, at most IN_FLIGHT at once."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int, case: Reference) -> tuple[int, ...]:
        async with gate:
            result = await client.generate(
                token_ids=case.prompt,
                max_tokens=tokens,
                temperature=0.8,
                top_p=0.95,
                seed=1000 + number,
                ignore_eos=True,
            )
        return result.token_ids

    return list(await asyncio.gather(*(one(number, case) for number, case in enumerate(cases))))


def assert_equal_to_references(results: Sequence[Result], cases: Sequence[Reference], tokens: int) -> None:
    wrong = {
        case.name: _first_difference(list(result.token_ids), case.completion[:tokens])
        for result, case in zip(results, cases, strict=True)
        if list(result.token_ids) != case.completion[:tokens]
    }
    assert not wrong, f"first differing index by prompt: {wrong}"


async def _greedy(client: AsyncClient, case: Reference, tokens: int) -> Result:
    return await client.generate(token_ids=case.prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True)


def _first_difference(got: list[int], wanted: list[int]) -> int:
    same = (index for index, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
    return next(same, min(len(got), len(wanted)))
