"""The router's book: charged once, settled to zero, and never counted twice beside a heartbeat."""

from hypothesis import given, settings
from hypothesis import strategies as st
from router_views import worker

from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import RequestId, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad
from pdserve.router.bookings import Booking, Bookings, Charge
from pdserve.router.view import WorkerView

P, D = WorkerId("prefill-0"), WorkerId("decode-0")
R = RequestId("r")


def booking(at: float = 0.0, prefill: WorkerId | None = P, decode: WorkerId = D) -> Booking:
    return Booking(decode, blocks=10, prefill=prefill, prefill_tokens=100, prefill_s=0.5, at=at)


def test_both_sides_are_charged_for_their_part() -> None:
    bookings = Bookings()
    bookings.charge(R, booking())
    assert bookings.charged(P, 0.0) == Charge(requests=1, prefills=1, prefill_tokens=100, prefill_s=0.5)
    assert bookings.charged(D, 0.0) == Charge(requests=1, blocks=10)


def test_a_prefill_at_the_owner_is_one_request() -> None:
    bookings = Bookings()
    bookings.charge(R, booking(prefill=D))
    assert bookings.charged(D, 0.0) == Charge(
        requests=1, prefills=1, prefill_tokens=100, prefill_s=0.5, blocks=10
    )
    bookings.settle_prefill(R)
    assert bookings.charged(D, 0.0) == Charge(requests=1, streams=1, blocks=10)
    bookings.settle(R)
    assert bookings.charged(D, 0.0) == Charge()


def test_the_first_token_settles_the_prefill_only() -> None:
    bookings = Bookings()
    bookings.charge(R, booking())
    bookings.settle_prefill(R)
    assert bookings.charged(P, 0.0) == Charge()
    assert bookings.charged(D, 0.0).blocks == 10


def test_a_second_placement_gives_the_first_back() -> None:
    bookings = Bookings()
    other = WorkerId("decode-1")
    bookings.charge(R, booking())
    bookings.charge(R, booking(decode=other))
    assert bookings.charged(D, 0.0) == Charge()
    assert bookings.charged(other, 0.0).blocks == 10
    assert bookings.charged(P, 0.0).requests == 1


def test_only_decisions_after_the_heartbeat_are_fresh() -> None:
    bookings = Bookings()
    bookings.charge(RequestId("old"), booking(at=1.0))
    bookings.charge(RequestId("new"), booking(at=3.0))
    assert bookings.charged(P, 3.0, since=2.0).requests == 1
    assert bookings.charged(P, 0.0).requests == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["charge", "first token", "end"]),
            st.integers(0, 5),
            st.sampled_from(["prefill-0", "prefill-1", "decode-0"]),
        ),
        max_size=60,
    )
)
def test_everything_settled_means_everything_zero(steps: list[tuple[str, int, str]]) -> None:
    bookings = Bookings()
    for step, number, prefill in steps:
        request = RequestId(str(number))
        if step == "charge":
            bookings.charge(request, booking(prefill=WorkerId(prefill)))
        elif step == "first token":
            bookings.settle_prefill(request)
        else:
            bookings.settle(request)
        bookings.check_integrity()
    for number in range(6):
        bookings.settle(RequestId(str(number)))
    bookings.check_integrity()
    assert len(bookings) == 0
    assert all(bookings.charged(name, 0.0) == Charge() for name in (P, D, WorkerId("prefill-1")))


def test_work_in_a_heartbeat_is_not_counted_again() -> None:
    perf = PerfModel()
    queued = perf.prefill_seconds(1000, 0, 256).seconds
    plain = worker("prefill-0", Role.PREFILL)
    mine = Charge(requests=1, prefills=1, prefill_tokens=1000, prefill_s=queued, blocks=5)

    def seen(load: WorkerLoad, fresh: Charge) -> WorkerView:
        return WorkerView(plain.record, load, perf, 256, mine, fresh)

    reported = WorkerLoad(queued_prefill_tokens=1000, promised_blocks=5)
    assert seen(WorkerLoad(), mine).wait_s == queued, "before the heartbeat"
    assert seen(reported, Charge()).wait_s == queued, "the heartbeat has it"
    assert seen(WorkerLoad(), Charge()).wait_s == queued, "a heartbeat that was too early"
    assert seen(reported, mine).wait_s == 2 * queued, "another router's work, and then ours"
    assert [seen(reported, fresh).promised_blocks for fresh in (Charge(), mine)] == [5, 10]
