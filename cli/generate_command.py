"""`pdserve generate`: completions of prompts by a running cluster."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdserve.cli.answer_text import write_answer
from pdserve.cli.connection import DEFAULT_TARGET, Model, Target
from pdserve.cli.credentials import CREDENTIALS, credentials
from pdserve.cli.gathering import gathers
from pdserve.cli.sampling_options import CONSTRAINTS, REPORTS, SAMPLING, request_options
from pdserve.core.errors import InvalidRequest, PdserveError

if TYPE_CHECKING:
    from pdserve.client import Choice, ChunkStream, Client, RequestOptions

INTERRUPTED = 130
"""Exit status of what Ctrl-C ended, as shells have it."""


@dataclass(frozen=True, slots=True)
class Source:
    """One prompt. `name` is its file; None for the argument and for standard input."""

    name: str | None
    read: Callable[[], str]
    """Called when its turn has come. Raises InvalidRequest."""


@gathers("security", CREDENTIALS)
@gathers("sampling", (*SAMPLING, *CONSTRAINTS, *REPORTS))
def generate(
    sampling: Mapping[str, Any],
    security: Mapping[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="The prompt.", show_default="standard input")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            help="A file with a prompt, - is standard input. May be repeated; each is one completion.",
            metavar="FILE",
        ),
    ] = None,
    target: Target = DEFAULT_TARGET,
    model: Model = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; only with --chat.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each request.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each completion.")
    ] = False,
) -> None:
    """Complete prompts, streaming each answer as it comes.

    Exit status: 0; 1 where a completion failed; 2 for a wrong command line; 130 after Ctrl-C, which cancels
    the request and leaves what has arrived.
    """
    if prompt is not None and file:
        raise typer.BadParameter("got a prompt and --file: give one of them")
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat: only a chat has roles")
    options = request_options(sampling)
    from pdserve.client import Client

    try:
        with Client(target, timeout=timeout, **credentials(security)) as client:
            completions = _Completions(client, model, system, chat, as_json, options)
            failures = sum(not completions.complete(source) for source in _sources(prompt, file or []))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if failures:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Completions:
    """What holds for each prompt of one call."""

    client: "Client"
    model: str
    system: str | None
    chat: bool
    as_json: bool
    options: "RequestOptions"

    def complete(self, source: Source) -> bool:
        """One completion, printed. False where it failed: said, for a file; without a name it raises."""
        try:
            text = source.read()
            if source.name is not None and not self.as_json:
                print(f"==> {source.name} <==", file=sys.stderr, flush=True)
            self._print(self._open(text), source.name)
        except PdserveError as error:
            if source.name is None:
                raise
            print(f"pdserve: {source.name}:", *error.message.split(), file=sys.stderr)
            return False
        return True

    def _open(self, text: str) -> "ChunkStream":
        options = self.options.copy()
        options["model"] = self.model
        if not self.chat:
            return self.client.generate(text, stream=True, **options)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        options["messages"] = [*system, {"role": "user", "content": text}]
        return self.client.generate(stream=True, **options)

    def _print(self, stream: "ChunkStream", name: str | None) -> None:
        with stream:
            if self.as_json:
                _print_json(stream, name)
            elif (self.options.get("n") or 1) == 1:
                _print_stream(stream)
            else:
                _print_choices(stream)


def _sources(prompt: str | None, files: Sequence[str]) -> list[Source]:
    if prompt is not None:
        return [Source(None, lambda: prompt)]
    if not files:
        return [Source(None, partial(_read, "-"))]
    return [Source(file, partial(_read, file)) for file in files]


def _read(name: str) -> str:
    """Raises InvalidRequest for what cannot be read and for what is not UTF-8."""
    if name == "-" and sys.stdin.isatty():
        print("pdserve: type the prompt, Ctrl-D ends it", file=sys.stderr)
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        shown = "standard input" if name == "-" else name
        raise InvalidRequest(f"{shown} is not UTF-8, see byte {error.start}: convert it first") from error


def _print_stream(stream: "ChunkStream") -> None:
    said = False
    try:
        for chunk in stream:
            said = True
            write_answer(chunk.text)
    except PdserveError:
        if said:
            write_answer("\n")
        raise
    except KeyboardInterrupt:
        write_answer("\n")
        raise
    write_answer("\n")


def _print_choices(stream: "ChunkStream") -> None:
    """One after the other at the end, for they come mixed."""
    try:
        for _ in stream:
            pass
    except PdserveError:
        _write_choices(choice for choice in stream.partial.choices if choice.token_ids)
        raise
    except KeyboardInterrupt:
        _write_choices(stream.partial.choices)
        raise
    _write_choices(stream.partial.choices)


def _write_choices(choices: "Iterable[Choice]") -> None:
    for choice in choices:
        write_answer(f"--- choice {choice.index}\n{choice.text}\n")


def _print_json(stream: "ChunkStream", name: str | None) -> None:
    file = {} if name is None else {"file": name}
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        arrived = {**file, **dataclasses.asdict(stream.partial), "finish_reason": "abort"}
        typer.echo(json.dumps(arrived, ensure_ascii=False))
        raise
    typer.echo(json.dumps({**file, **stream.result().to_dict()}, ensure_ascii=False))
