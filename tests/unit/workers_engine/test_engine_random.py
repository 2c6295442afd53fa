"""Random workloads on small pools: all books agree after each step, all outputs are the undisturbed ones."""

from dataclasses import dataclass

from engine_harness import Harness, expected_tokens, greedy, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.types import FinishReason, OwnerId, SequenceId, blocks_for

POOL_BLOCKS = 8


@dataclass(frozen=True)
class Submit:
    length: int
    salt: int
    max_tokens: int
    kind: str


@dataclass(frozen=True)
class Abort:
    index: int


@dataclass(frozen=True)
class Fail:
    pass


@dataclass(frozen=True)
class Weigh:
    weight: float


@dataclass(frozen=True)
class Step:
    times: int


def submits() -> st.SearchStrategy[Submit]:
    return st.builds(
        Submit,
        length=st.integers(1, 70),
        salt=st.integers(0, 2),
        max_tokens=st.integers(1, 40),
        kind=st.sampled_from(["sample", "sample", "prefill", "handoff"]),
    )


EVENTS = st.lists(
    st.one_of(
        submits(),
        submits(),
        st.builds(Step, st.integers(1, 12)),
        st.builds(Abort, st.integers(0, 9)),
        st.builds(Fail),
        st.builds(Weigh, st.floats(0, 1)),
    ),
    min_size=1,
    max_size=24,
)


class Workload:
    """Plays events against an engine; what prefills left behind is released when they end, as a P would."""

    def __init__(self, token_budget: int, chunk_tokens: int, max_sequences: int) -> None:
        self.harness = Harness(POOL_BLOCKS, token_budget, chunk_tokens, max_sequences)
        self.asked: dict[str, Submit] = {}
        self.disturbed = False

    def play(self, event: Submit | Abort | Fail | Weigh | Step) -> None:
        match event:
            case Submit():
                self.submit(event)
            case Abort(index):
                self.harness.engine.abort(SequenceId(f"s{index}"))
            case Fail():
                self.harness.runner.fail_next = RuntimeError("injected")
                self.disturbed = True
            case Weigh(weight):
                self.harness.engine.set_role_weight(weight)
            case Step(times):
                for _ in range(times):
                    self.step()

    def submit(self, event: Submit) -> None:
        positions = event.length + (event.max_tokens - 1 if event.kind != "prefill" else 0)
        if blocks_for(positions) > POOL_BLOCKS:
            return
        name = f"s{len(self.asked)}"
        prompt, params = prompt_of(event.length, event.salt), greedy(event.max_tokens, event.salt)
        if event.kind == "handoff":
            room = self.harness.pool.available() >= blocks_for(event.length)
            if event.length < 2 or not room:
                return
            self.harness.engine.submit(self.harness.commit(name, prompt, params))
        else:
            self.harness.submit(name, prompt, params if event.kind == "sample" else None)
        self.asked[name] = event

    def step(self) -> None:
        for item in self.harness.step().items:
            if self.asked[item.sequence_id].kind == "prefill" and (item.finish_reason or item.error):
                self.harness.pool.release(OwnerId(item.sequence_id))

    def check(self) -> None:
        for name, asked in self.asked.items():
            last = self.harness.last(name)
            assert all(i.finish_reason is None and i.error is None for i in self.harness.items(name)[:-1])
            if asked.kind == "prefill":
                assert self.harness.tokens(name) == []
                continue
            whole = expected_tokens(prompt_of(asked.length, asked.salt), greedy(asked.max_tokens, asked.salt))
            tokens = self.harness.tokens(name)
            assert tokens == whole[: len(tokens)]
            if last.finish_reason is FinishReason.LENGTH:
                assert tokens == whole
            else:
                assert last.finish_reason is FinishReason.ABORT or (last.error and self.disturbed)
        assert self.harness.pool.owners() == ()
        assert self.harness.pool.counts().held == 0


@settings(max_examples=120, deadline=None)
@given(
    events=EVENTS,
    token_budget=st.integers(1, 80),
    chunk_tokens=st.integers(1, 40),
    max_sequences=st.integers(1, 6),
)
def test_any_workload_ends_with_the_right_tokens_and_an_empty_pool(
    events: list[Submit | Abort | Fail | Weigh | Step],
    token_budget: int,
    chunk_tokens: int,
    max_sequences: int,
) -> None:
    workload = Workload(token_budget, chunk_tokens, max_sequences)
    for event in events:
        workload.play(event)
    for _ in range(3000):
        if not workload.harness.engine.has_work:
            break
        workload.step()
    assert not workload.harness.engine.has_work
    workload.check()
