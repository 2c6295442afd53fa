"""`pdserve demo`: one prompt through a whole cluster, and a table of what happened to it."""

import asyncio
import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.client import AsyncClient, Result
from pdserve.cluster.cluster import Cluster
from pdserve.core.config import RouterConfig, ServeConfig

PROMPT = "Explain in three sentences why serving a language model has a prefill and a decode phase."
MAX_TOKENS = 96


def demo(
    *,
    as_json: bool = False,
    model: str = "smollm2-135m",
    prompt: str = PROMPT,
    max_tokens: int = MAX_TOKENS,
    config: ServeConfig | None = None,
) -> int:
    """Start 1 prefill + 1 decode worker, stream one answer, print the table; `as_json`: an object last."""
    base = config or ServeConfig()
    free_port = dataclasses.replace(base.router, grpc_port=0)
    chosen = dataclasses.replace(base, model=model, router=RouterConfig(**dataclasses.asdict(free_port)))
    result = asyncio.run(_run(chosen, prompt, max_tokens))
    if as_json:
        print(json.dumps(record(result)), flush=True)
    return 0


async def _run(config: ServeConfig, prompt: str, max_tokens: int) -> Result:
    console = Console()
    roles = f"{config.prefill} prefill + {config.decode} decode worker"
    console.print(f"starting redis, Ray, a router and {roles} for [bold]{config.model}[/bold] …")
    async with Cluster(config) as cluster, AsyncClient(cluster.router_endpoint) as client:
        # The first request pays for connections and cold caches; it is another prompt, so nothing is reused.
        await client.generate("The quick brown fox jumps over the lazy dog. " * 4, max_tokens=4)
        console.print(f"\n[bold]prompt[/bold]  {prompt}\n[bold]answer[/bold]  ", end="")
        messages = [{"role": "user", "content": prompt}]
        stream = await client.generate(messages=messages, max_tokens=max_tokens, stream=True)
        async for chunk in stream:
            console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
        console.print("\n")
        result = stream.result()
        console.print(_table(result))
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
        "ttft_ms": result.ttft_s * 1e3,
        "ledger_ms": {name: seconds * 1e3 for name, seconds in result.ledger.parts().items()},
    }


def _table(result: Result) -> Table:
    route = result.route
    usage = result.usage
    table = Table(title="what happened to it", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("prefill", f"{route.prefill_worker} (pid {route.prefill_pid})")
    table.add_row("decode", f"{route.decode_worker} (pid {route.decode_pid})")
    table.add_row("transport", route.transport or "none: the prefill ran at the decode worker")
    table.add_row("moved", f"{route.blocks_moved} blocks, {route.bytes_moved / 1e6:.2f} MB")
    table.add_row("tokens", f"{usage.prompt_tokens} in, {usage.completion_tokens} out")
    table.add_row("time to first token", f"{result.ttft_s * 1e3:.1f} ms, of which")
    for name, seconds in result.ledger.parts().items():
        table.add_row(f"  {name.replace('_', ' ')}", f"{seconds * 1e3:8.2f} ms")
    return table
