"""`pdserve demo`: one prompt through a whole cluster, and a table of what happened to it."""

import dataclasses
import json
import signal
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdserve.client import AsyncClient, PrefillCost, Result
from pdserve.cluster.cluster import Cluster
from pdserve.cluster.signals import run_until_signal
from pdserve.core.config import ServeConfig

PROMPT = "What is the capital of France, and what is it known for?"
MAX_TOKENS = 96
WARM_UP_PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
"""Pays for connections and cold caches; it shares no block with the prompt, so nothing is reused."""

_BAR_CELLS = 32
_INTERRUPTED = 128 + signal.SIGINT


def demo(
    *,
    as_json: bool = False,
    model: str = "smollm2-135m",
    prompt: str = PROMPT,
    max_tokens: int = MAX_TOKENS,
    config: ServeConfig | None = None,
) -> int:
    """Start 1 prefill + 1 decode worker, stream one answer, print the table; `as_json`: an object last.

    Returns the exit status. Raises PdserveError.
    """
    base = config or ServeConfig()
    # One prompt on an idle cluster is cheaper where it decodes; here a handoff is what there is to see.
    router = dataclasses.replace(base.router, grpc_port=0, disaggregation="always")
    chosen = dataclasses.replace(base, model=model, router=router)
    cluster = Cluster(chosen)
    result = run_until_signal(_run(cluster, prompt, max_tokens), cluster.remove_files)
    if result is None:
        return _INTERRUPTED
    if as_json:
        print(json.dumps(record(result)), flush=True)
    return 0


async def _run(cluster: Cluster, prompt: str, max_tokens: int) -> Result:
    console = Console(highlight=False)
    config = cluster.config
    workers = f"{config.prefill} prefill + {config.decode} decode worker"
    console.print(f"starting redis, Ray, a router and {workers} for [bold]{config.model}[/bold] …")
    async with cluster, AsyncClient(cluster.router_endpoint) as client:
        await client.generate(WARM_UP_PROMPT, max_tokens=4)
        console.print()
        console.print(Text.assemble(("prompt  ", "bold cyan"), prompt), soft_wrap=True)
        console.print(Text("answer  ", "bold cyan"), end="")
        messages = [{"role": "user", "content": prompt}]
        stream = await client.generate(messages=messages, max_tokens=max_tokens, stream=True)
        async for chunk in stream:
            console.print(chunk.text, end="", markup=False, soft_wrap=True)
        console.print("\n")
        result = stream.result()
        console.print(table(result))
        return result


def record(result: Result) -> dict[str, Any]:
    """The demo's figures as one JSON object. Times in milliseconds."""
    route = result.route
    return {
        "text": result.text,
        "tokens": len(result.token_ids),
        "prefill_worker": route.prefill_worker,
        "decode_worker": route.decode_worker,
        "prefill_pid": route.prefill_pid,
        "decode_pid": route.decode_pid,
        "transport": route.transport,
        "blocks_moved": route.blocks_moved,
        "bytes_moved": route.bytes_moved,
        "predicted_local_ms": _cost_ms(route.predicted_local),
        "predicted_handoff_ms": _cost_ms(route.predicted_handoff),
        "measured_ms": route.measured_s * 1e3,
        "ttft_ms": result.ttft_s * 1e3,
        "ledger_ms": {name: seconds * 1e3 for name, seconds in result.ledger.parts().items()},
    }


def _cost_ms(cost: PrefillCost | None) -> dict[str, float] | None:
    """`own`: until the first token; `harm`: what others lose by it."""
    return None if cost is None else {"own": cost.seconds * 1e3, "harm": cost.harm_s * 1e3}


def table(result: Result) -> Table:
    """Who did what, what moved, and where the time to the first token went."""
    route, usage = result.route, result.usage
    moved = f"{route.blocks_moved} blocks, {route.bytes_moved / 1e6:.2f} MB, over {route.transport}"
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rows.add_column("what happened to it", style="bold", no_wrap=True)
    rows.add_column("", justify="right", no_wrap=True)
    rows.add_column("", no_wrap=True)
    rows.add_row("prefill by", route.prefill_worker, f"process {route.prefill_pid}")
    rows.add_row("decode by", route.decode_worker, f"process {route.decode_pid}")
    rows.add_row("KV cache moved", "", moved if route.transport else "nothing: prefilled where it decodes")
    local, handoff = route.predicted_local, route.predicted_handoff
    if local is not None and handoff is not None:
        expected = f"a handoff {_milliseconds(handoff.seconds)}, none {_milliseconds(local.seconds)}"
        rows.add_row("prefill expected", "", expected)
        rows.add_row("prefill measured", "", _milliseconds(route.measured_s))
    rows.add_row("tokens", "", f"{usage.prompt_tokens} in, {usage.completion_tokens} out", end_section=True)
    rows.add_row("time to first token", _milliseconds(result.ttft_s), "of which")
    for name, seconds in result.ledger.parts().items():
        share = seconds / result.ttft_s if result.ttft_s > 0 else 0.0
        bar = Text("█" * round(share * _BAR_CELLS), "cyan")
        rows.add_row(f"  {name.replace('_', ' ')}", _milliseconds(seconds), bar)
    return rows


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
