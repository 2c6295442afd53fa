"""What D's performance model learns from each request: what its way to the first token took."""

from pdserve.core.exploration import PrefillPath
from pdserve.core.handoff_overhead import movement
from pdserve.core.perfmodel import PerfModel
from pdserve.workers.decode_request import DecodeRequest


class PrefillLessons:
    """The router weighs D's own pool against handoffs with what is learnt here. See core/perfmodel.py."""

    def __init__(self, perf: PerfModel, *, chunk_tokens: int, block_bytes: int) -> None:
        """`chunk_tokens`: of P's steps, which are taken to be as D's. `block_bytes`: of one block's KV."""
        self._perf = perf
        self._chunk_tokens = chunk_tokens
        self._block_bytes = block_bytes

    def first_token(self, request: DecodeRequest) -> None:
        """A request's first token came, and its route is complete. Of one that had to walk on, the time is
        that of several ways and no measure of any; but it was asked for a handoff, and a try is used up."""
        detour = request.route.candidates_tried > 0
        local = request.handoff is None and not detour
        self._perf.observe_path(PrefillPath.LOCAL if local else PrefillPath.HANDOFF, request.route.measured_s)
        if not detour:
            self._handoff(request)

    def _handoff(self, request: DecodeRequest) -> None:
        done, asked_at = request.handoff, request.marks.serving_open
        if done is None or asked_at is None or done.prefix is not None:
            return  # fetching a prefix first is a cost of its own
        moved = movement(
            positions=done.num_computed,
            cached=done.prefill_cached_tokens,
            held_blocks=done.blocks_reused,
            chunk_tokens=self._chunk_tokens,
            block_bytes=self._block_bytes,
            prefill_s=done.prefill_s,
        )
        whole = done.committed_at - asked_at
        self._perf.observe_handoff(moved, done.transport, whole - done.prefill_queue_s - done.prefill_s)
