"""Options that several commands share, declared once and handed over as one mapping."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

Command = Callable[..., None]


def option(name: str, kind: Any, says: str, *, default: Any = None, **settings: Any) -> inspect.Parameter:
    """One option as a parameter; `says` is its help, `settings` are those of typer.Option."""
    flags = settings.pop("flags", ())
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*flags, help=says, **settings)],
    )


def gathers(into: str, options: Iterable[inspect.Parameter]) -> Callable[[Command], Command]:
    """A decorator: the command takes `options` beside its own, and gets them as its parameter `into`."""
    shared = tuple(options)

    def decorate(command: Command) -> Command:
        def gathered(**arguments: Any) -> None:
            mapping: Mapping[str, Any] = {option.name: arguments.pop(option.name) for option in shared}
            command(**arguments, **{into: mapping})

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != into
        ]
        gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
        gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        gathered.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        return gathered

    return decorate
