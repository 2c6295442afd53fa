"""Keys past what everybody has."""

from pdserve.core.types import BLOCK_TOKENS
from pdserve.kvtransfer.names import chain
from pdserve.router.universal import UniversalPrefix

ROOT = b"r" * 16
SYSTEM = list(range(2 * BLOCK_TOKENS))


def prompt(number: int, system: list[int] = SYSTEM) -> list[int]:
    return system + [1000 + number] * BLOCK_TOKENS


def trained(prompts: list[list[int]], share: float = 0.5, **bounds: int) -> UniversalPrefix:
    universal = UniversalPrefix(share, **bounds)
    for tokens in prompts:
        universal.observe(chain(ROOT, tokens))
    return universal


def key(universal: UniversalPrefix, tokens: list[int]) -> bytes:
    return universal.ring_key(chain(ROOT, tokens), tokens)


def test_a_shared_system_prompt_is_keyed_past() -> None:
    universal = trained([prompt(number) for number in range(20)])
    assert universal.length(chain(ROOT, prompt(99))) == 2
    keys = {key(universal, prompt(number)) for number in range(20)}
    assert len(keys) == 20


def test_before_enough_prompts_were_seen_the_first_block_is_the_key() -> None:
    universal = trained([prompt(number) for number in range(7)], minimum=8)
    assert key(universal, prompt(0)) == chain(ROOT, prompt(0))[0]


def test_a_prefix_of_half_the_prompts_or_less_is_not_universal() -> None:
    other = [5] * (2 * BLOCK_TOKENS)
    mixed = [prompt(number) for number in range(10)] + [prompt(number, other) for number in range(10)]
    universal = trained(mixed)
    assert universal.length(chain(ROOT, prompt(0))) == 0


def test_one_prompt_many_times_is_one_prompt() -> None:
    universal = trained([prompt(1)] * 50)
    assert universal.length(chain(ROOT, prompt(1))) == 0


def test_prompts_that_leave_the_window_are_forgotten() -> None:
    old = [prompt(number) for number in range(16)]
    new = [[7 + number] * (3 * BLOCK_TOKENS) for number in range(16)]
    universal = trained(old + new, window=16)
    assert universal.length(chain(ROOT, prompt(0))) == 0
    assert universal.length(chain(ROOT, prompt(3))) == 0


def test_prompts_of_one_session_share_their_key() -> None:
    universal = trained([prompt(number) for number in range(20)])
    assert key(universal, prompt(3)) == key(universal, prompt(3) + [1] * 100)


def test_a_prompt_without_a_block_of_its_own_is_keyed_on_all_tokens() -> None:
    universal = trained([prompt(number) for number in range(20)])
    assert key(universal, [1, 2, 3]) != key(universal, [1, 2, 4])
    assert key(universal, [*SYSTEM, 1]) != key(universal, [*SYSTEM, 2])
    assert key(universal, [*SYSTEM, 1]) == key(universal, [*SYSTEM, 1])
    assert {len(key(universal, tokens)) for tokens in ([1], SYSTEM, prompt(0))} == {16}


def test_counts_are_bounded_in_depth() -> None:
    deep = [9] * (40 * BLOCK_TOKENS)
    universal = trained([deep + [number] * BLOCK_TOKENS for number in range(20)], depth=4)
    # Only the first four blocks are compared, so these prompts count as one.
    assert universal.length(chain(ROOT, deep)) == 0
