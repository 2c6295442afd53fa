"""What the demo says of a request."""

import pytest
from rich.console import Console

from pdserve.client.values import Choice, PrefillCost, Result, Route
from pdserve.cluster.demo import record, table
from pdserve.core.lifecycle import Ledger
from pdserve.core.types import FinishReason, RequestId, Usage

ROUTE = Route(
    prefill_worker="prefill-0",
    decode_worker="decode-0",
    prefill_pid=11,
    decode_pid=12,
    transport="shm",
    blocks_moved=3,
    bytes_moved=2_211_840,
    predicted_local=PrefillCost(0.25, 0.5),
    predicted_handoff=PrefillCost(0.125, 0.0),
    measured_s=0.15625,
)


def result(route: Route = ROUTE) -> Result:
    return Result(
        request_id=RequestId("r"),
        text="Because.",
        token_ids=(5, 6, 7),
        finish_reason=FinishReason.STOP,
        choices=(Choice(0, "Because.", (5, 6, 7), FinishReason.STOP, ()),),
        usage=Usage(prompt_tokens=48, completion_tokens=3, cached_tokens=0),
        ledger=Ledger(prefill=0.15, first_step=0.03).close(0.2),
        route=route,
        ttft_s=0.2,
        duration_s=0.3,
        attempts=1,
    )


def printed(shown: Result) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table(shown))
    return capture.get()


def test_the_record_has_exactly_the_promised_fields_in_milliseconds() -> None:
    fields = record(result())
    ledger = fields.pop("ledger_ms")
    assert fields == {
        "text": "Because.",
        "tokens": 3,
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "prefill_pid": 11,
        "decode_pid": 12,
        "transport": "shm",
        "blocks_moved": 3,
        "bytes_moved": 2_211_840,
        "predicted_local_ms": {"own": 250.0, "harm": 500.0},
        "predicted_handoff_ms": {"own": 125.0, "harm": 0.0},
        "measured_ms": 156.25,
        "ttft_ms": 200.0,
    }
    assert ledger["prefill"] == pytest.approx(150.0)
    assert sum(ledger.values()) == pytest.approx(200.0)


def test_the_table_names_who_what_and_every_part_of_the_ledger() -> None:
    text = printed(result())
    for words in (
        "prefill-0",
        "decode-0",
        "3 blocks, 2.21 MB, over shm",
        "48 in, 3 out",
        "200.0 ms",
        "250.0 ms",
    ):
        assert words in text
    for part in Ledger().parts():
        assert part.replace("_", " ") in text


def test_a_prompt_that_was_prefilled_where_it_decodes_moved_nothing() -> None:
    alone = Route(prefill_worker="decode-0", decode_worker="decode-0", prefill_pid=12, decode_pid=12)
    assert "nothing: prefilled where it decodes" in printed(result(alone))
