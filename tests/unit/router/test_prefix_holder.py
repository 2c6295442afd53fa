"""Who is named as the holder of a prompt's prefix, beside the candidates."""

from router_views import decoders, prefillers, worker

from pdserve.core.types import Role, WorkerId
from pdserve.router.policies.prefix_holder import Holding, prefix_holder
from pdserve.router.view import ClusterView, WorkerView

P0, P1, D0, D1 = (WorkerId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"))


def view(*changed: WorkerView) -> ClusterView:
    names = {one.worker for one in changed}
    return ClusterView((*changed, *(w for w in (*prefillers(2), *decoders(2)) if w.worker not in names)))


def test_the_deepest_holder_is_named() -> None:
    """Turn 2 of a chat: the answer's blocks are at the worker that decoded them."""
    assert prefix_holder(view(), {P0: 4, D0: 9, D1: 6}, (P0, D1)) == Holding(D0, 9)


def test_a_candidate_may_hold_for_another_one() -> None:
    assert prefix_holder(view(), {P0: 4, D0: 9}, (P0, D0)) == Holding(D0, 9)
    assert prefix_holder(view(), {P0: 9, D0: 4}, (P0, D0)) == Holding(P0, 9)  # should D have to compute


def test_nobody_is_named_where_nobody_gains() -> None:
    assert prefix_holder(view(), {}, (P0, D0)) is None
    assert prefix_holder(view(), {P0: 0}, (P0, D0)) is None
    assert prefix_holder(view(), {P0: 9, D0: 9}, (P0, D0)) is None
    assert prefix_holder(view(), {D0: 9}, (D0,)) is None


def test_who_cannot_be_asked_is_not_named() -> None:
    for gone in (
        worker("decode-0", Role.DECODE, suspect=True),
        worker("decode-0", Role.DECODE, draining=True),
    ):
        assert prefix_holder(view(gone), {P0: 4, D0: 9, D1: 6}, (P0, D1)) == Holding(D1, 6)
    assert prefix_holder(view(), {P0: 4, WorkerId("left"): 9}, (P0, D1)) == Holding(P0, 4)


def test_of_equal_holders_the_order_of_names_decides_not_that_of_the_view() -> None:
    depths = {D0: 9, D1: 9}
    forward = ClusterView((*prefillers(2), *decoders(2)))
    backward = ClusterView((*reversed(decoders(2)), *prefillers(2)))
    assert prefix_holder(forward, depths, (P0,)) == prefix_holder(backward, depths, (P0,)) == Holding(D0, 9)
