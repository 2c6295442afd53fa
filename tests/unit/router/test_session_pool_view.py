"""What a placement sees of workers that may have left since the request was read."""

from router_views import record

from pdserve.core.clock import ManualClock
from pdserve.core.config import EngineConfig, SessionConfig
from pdserve.core.types import Role
from pdserve.router.bookings import Bookings
from pdserve.router.session_pool import SessionPool


class NoMembers:
    available = True

    def current(self) -> tuple[()]:
        return ()


async def test_a_worker_that_has_left_is_not_in_the_view() -> None:
    pool = SessionPool(
        NoMembers(),
        Bookings(),
        router="router-1",
        config=SessionConfig(),
        engine=EngineConfig(),
        clock=ManualClock(),
    )
    view = pool.view([record("decode-0", Role.DECODE), record("prefill-0", Role.PREFILL)])
    assert view.workers == ()
