"""`pdserve demo`."""

from typing import Annotated, Any

import typer


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Model folder, .gguf file or id.", show_default="smollm2-135m")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
) -> None:
    """Start 1 prefill + 1 decode worker, stream one answer, show who did what and where the time went."""
    from pdserve.cluster.demo import demo as run_demo

    wishes: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
    raise typer.Exit(run_demo(as_json=as_json, **{k: v for k, v in wishes.items() if v is not None}))
