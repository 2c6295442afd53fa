"""`pdserve chat`: a conversation with a model of a running cluster."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdserve.cli.connection import DEFAULT_TARGET, Model, Target
from pdserve.cli.credentials import CREDENTIALS, credentials
from pdserve.cli.gathering import gathers
from pdserve.cli.sampling_options import SAMPLING, request_options
from pdserve.core.errors import Unavailable, UnknownModel

if TYPE_CHECKING:
    from pdserve.client import Client, ModelInfo


@gathers("security", CREDENTIALS)
@gathers("sampling", SAMPLING)
def chat(
    sampling: Mapping[str, Any],
    security: Mapping[str, Any],
    target: Target = DEFAULT_TARGET,
    model: Model = "",
    system: Annotated[str, typer.Option(help="System prompt.", show_default="none")] = "",
    stats: Annotated[
        bool, typer.Option("--stats", help="After each answer: tokens, speed, who prefilled and who decoded.")
    ] = False,
    history: Annotated[
        bool, typer.Option(help="Keep what is typed in the history file of the user's state folder.")
    ] = True,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each answer.")] = None,
) -> None:
    """Talk to a model. /help says what can be typed; Ctrl-C cancels an answer, Ctrl-D leaves.

    Answers go to standard output, everything else to standard error.
    """
    params = request_options(sampling)
    from pdserve.cli.chat_answer import Answerer
    from pdserve.cli.chat_conversation import Conversation
    from pdserve.cli.chat_input import ChatInput, history_file
    from pdserve.cli.chat_loop import Chat, complain, note
    from pdserve.client import Client

    with Client(target, timeout=timeout, **credentials(security)) as client:
        served = _served(client, model)
        user = ChatInput(history_file(os.environ, Path.home()) if history else None)
        if user.prompts:
            note(f"{served.name}, {served.context_tokens} tokens of context; /help says what can be typed")
        if user.trouble:
            complain(user.trouble)
        Chat(user, Answerer(client, served, stats=stats), Conversation(system), params).run()


def _served(client: "Client", name: str) -> "ModelInfo":
    """The model that is meant; empty means the only one. Raises UnknownModel, which lists them."""
    models = client.models()
    if not models:
        raise Unavailable("the cluster serves no model now: see pdserve status")
    found = [model for model in models if name in ("", model.name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(model.name for model in models)
    asked = f"model {name!r} is not served" if name else f"{len(models)} models are served"
    raise UnknownModel(f"{asked}: name one of {listed} with --model")
