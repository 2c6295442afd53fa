"""The chat itself: messages, slash commands, and what Ctrl-C means."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pdserve.cli.chat_conversation import Conversation
from pdserve.cli.sampling_options import SAMPLING
from pdserve.core.errors import PdserveError

if TYPE_CHECKING:
    from pdserve.cli.chat_answer import Answerer
    from pdserve.cli.chat_input import ChatInput
    from pdserve.client import RequestOptions

HELP = """\
/reset          forget the conversation, keep the system prompt
/system TEXT    use another system prompt; without TEXT: none
/save FILE      write the conversation as JSON
/params         show how answers are sampled
/params A=B …   change that; A= takes the server's choice again
/help           this
/quit           leave, as Ctrl-D does

A line that ends in \\ goes on in the next one; three quotes begin and end a message of several lines;
a message that begins with // is sent with one of them. Ctrl-C cancels the answer that runs, and what has
come of it stays in the conversation; once more at an empty prompt, it leaves."""


def note(text: str) -> None:
    """Say something that is no answer: standard output has the answers alone."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """One line, whatever it quotes."""
    note(" ".join(["pdserve:", *text.split()]))


class Chat:
    """Runs until the input ends or the user leaves."""

    def __init__(
        self,
        user: "ChatInput",
        answerer: "Answerer",
        conversation: Conversation,
        params: "RequestOptions",
    ) -> None:
        self._user = user
        self._answerer = answerer
        self._conversation = conversation
        self._params = params
        self._interrupted = False
        """Ctrl-C was the last thing that the user did."""
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/params": self._change_params,
            "/help": lambda rest: note(HELP),
        }

    def run(self) -> None:
        """Errors are said, and the conversation goes on; those of reading a pipe are raised."""
        while True:
            try:
                text = self._user.read()
                self._interrupted = False
                if text is None or text.strip() == "/quit":
                    return
                self._take(text)
            except KeyboardInterrupt:
                leaves = self._interrupted and self._user.empty
                note("")
                if leaves:
                    return
                self._interrupted = True
                note("(Ctrl-C once more, or Ctrl-D, leaves)")
            except PdserveError as error:
                if not self._user.prompts:
                    raise
                complain(error.message)

    def _take(self, text: str) -> None:
        """One message or command of the user."""
        stripped = text.strip()
        if stripped.startswith("//"):
            self._answer(stripped[1:])
        elif stripped.startswith("/"):
            name, _, rest = stripped.partition(" ")
            command = self._commands.get(name)
            if command is None:
                complain(f"no command {name}: /help lists them; // sends a message that begins with /")
            else:
                command(rest.strip())
        elif stripped:
            self._answer(text)

    def _answer(self, text: str) -> None:
        answer = self._answerer.ask(self._conversation.asked(text), self._params)
        if answer.counts:
            self._conversation.turns.append((text, answer.text))
        if answer.error is not None:
            complain(answer.error.message)
        for line in answer.notes:
            note(line)
        if not answer.counts:
            note("(no answer came: the message is not part of the conversation)")
        self._interrupted = answer.cancelled

    def _reset(self, rest: str) -> None:
        self._conversation.turns.clear()
        note("(a new conversation)")

    def _system(self, rest: str) -> None:
        self._conversation.system = rest
        note("(the system prompt is set)" if rest else "(no system prompt)")

    def _save(self, rest: str) -> None:
        if not rest:
            complain("/save needs a file: /save chat.json")
            return
        try:
            Path(rest).write_text(
                json.dumps(self._conversation.to_dict(), ensure_ascii=False, indent=2) + "\n"
            )
        except OSError as error:
            complain(f"cannot write {rest}: {error.strerror}")
            return
        note(f"(written to {rest})")

    def _change_params(self, rest: str) -> None:
        known = {option.name for option in SAMPLING}
        changed = cast("dict[str, Any]", self._params)
        for change in rest.split():
            name, given, value = change.partition("=")
            if name not in known or not given:
                complain(f"cannot set {change}: write NAME=VALUE, names are {', '.join(sorted(known))}")
                return
            changed.pop(name, None)
            if value:
                changed[name] = _json_or_text(value)
        shown = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in changed.items())
        note(" ".join(shown) or "(the server's defaults)")


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
