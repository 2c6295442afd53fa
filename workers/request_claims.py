"""Which requests a decode worker remembers, and until when a router may claim them."""

import asyncio
from collections.abc import Callable, Iterator

from pdserve.core.types import RequestId
from pdserve.workers.decode_request import DecodeRequest


class RequestClaims:
    """Remembers a request until a router has read its end, or none came for it within `reattach_s`."""

    def __init__(self, reattach_s: float, abandon: Callable[[DecodeRequest], None]) -> None:
        """`abandon` ends a request that nobody claimed in time; it may be over already."""
        self._reattach_s = reattach_s
        self._abandon = abandon
        self._requests: dict[RequestId, DecodeRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[DecodeRequest]:
        """All of them as of now: they may be forgotten meanwhile."""
        return iter(tuple(self._requests.values()))

    def add(self, request: DecodeRequest) -> None:
        self._requests[request.request_id] = request

    def get(self, request_id: RequestId) -> DecodeRequest | None:
        return self._requests.get(request_id)

    def await_claim(self, request: DecodeRequest) -> None:
        """Give routers `reattach_s` from now, or from when the last one went, to attach."""
        if request.grace_timer is None:
            loop = asyncio.get_running_loop()
            request.grace_timer = loop.call_later(self._reattach_s, self._reap, request)

    def disown(self, request: DecodeRequest) -> None:
        """No router may claim it any more; its id is free as soon as it has ended."""
        request.disowned = True
        if request.settled:
            self.forget(request)

    def settled(self, request: DecodeRequest) -> None:
        """It has ended: somebody is to read that, if anybody may."""
        if request.disowned:
            self.forget(request)
        elif not request.is_heard:
            self.await_claim(request)

    def forget(self, request: DecodeRequest) -> None:
        """Its end was read, or never will be."""
        request.stop_grace()
        self._requests.pop(request.request_id, None)
        if request.link is not None:
            request.link.requests.discard(request.request_id)

    def _reap(self, request: DecodeRequest) -> None:
        request.grace_timer = None
        self.disown(request)
        self._abandon(request)
