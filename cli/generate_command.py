"""`pdserve generate`: one completion from a running cluster."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pdserve.client import ChunkStream
    from pdserve.client.convert import RequestOptions

DEFAULT_TARGET = "127.0.0.1:50051"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt.", show_default="standard input")] = None,
    target: Annotated[str, typer.Option(help="host:port of the cluster's gRPC API.")] = DEFAULT_TARGET,
    model: Annotated[str, typer.Option(help="Needed only where several are served.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; 1 is off.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest; 0 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the whole request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Complete a prompt, streaming the answer as it comes."""
    from pdserve.client import Client

    text = sys.stdin.read() if prompt is None else prompt
    options: RequestOptions = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "ignore_eos": ignore_eos,
    }
    if chat:
        options["messages"] = [{"role": "user", "content": text}]
    with Client(target, timeout=timeout) as client:
        stream = client.generate(None if chat else text, stream=True, **options)
        if as_json:
            _print_json(stream)
        else:
            _print_text(stream)


def _print_text(stream: "ChunkStream") -> None:
    try:
        for chunk in stream:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")


def _print_json(stream: "ChunkStream") -> None:
    for _ in stream:
        pass
    typer.echo(json.dumps(stream.result().to_dict(), ensure_ascii=False))
