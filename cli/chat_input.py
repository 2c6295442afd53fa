"""What the user types: lines with editing and a history, or the lines of a pipe."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.core.errors import InvalidRequest

try:
    import readline
except ModuleNotFoundError:  # a Python built without it edits no lines
    readline = None  # type: ignore[assignment]

PROMPT = "> "
CONTINUATION = "… "
QUOTES = '"""'
HISTORY_LINES = 1000


def history_file(environment: Mapping[str, str], home: Path) -> Path:
    """Where the history lies, after the XDG base directory specification."""
    state = Path(environment.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else home / ".local" / "state") / "pdserve" / "chat_history"


class ChatInput:
    """Reads messages from standard input. At a terminal it prompts, and edits lines."""

    def __init__(self, history: Path | None) -> None:
        """`history`: kept over chats; None keeps none. One that cannot be kept is not: see `trouble`."""
        self.prompts = sys.stdin.isatty()
        """Somebody types, and may try again."""
        self._edits = self.prompts and sys.stdout.isatty() and readline is not None
        self._history: Path | None = None
        self._typed = False
        self.trouble = ""
        """Why the history is not kept, for the user."""
        if self._edits:
            readline.set_auto_history(False)
            readline.set_history_length(HISTORY_LINES)
            if history is not None:
                self._load(history)

    @property
    def empty(self) -> bool:
        """Nothing had been typed when `read` was interrupted."""
        line = readline.get_line_buffer() if self._edits else ""
        return not self._typed and not line

    def read(self) -> str | None:
        """The next message; None at the end of the input.

        Raises KeyboardInterrupt for Ctrl-C, InvalidRequest for what is not UTF-8.

        A line that ends in a backslash goes on in the next one; three quotes begin a message that ends with
        three quotes.
        """
        self._typed = False
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return self._quoted(line.lstrip().removeprefix(QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            following = self._line(CONTINUATION)
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def _quoted(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(QUOTES):
            following = self._line(CONTINUATION)
            if following is None:
                return "\n".join(lines).strip("\n")
            lines.append(following)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        try:
            line = input(prompt) if self._edits else self._plain_line(prompt)
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the input is not UTF-8: {error.reason}; convert it first") from error
        self._typed |= bool(line)
        self._remember(line)
        return line

    def _plain_line(self, prompt: str) -> str:
        if self.prompts:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _load(self, history: Path) -> None:
        try:
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))  # others need not read it
            readline.read_history_file(history)
            readline.write_history_file(history)  # at most HISTORY_LINES
        except OSError as error:
            self.trouble = f"the history is not kept: {history}: {error.strerror}"
            return
        self._history = history

    def _remember(self, line: str) -> None:
        if not self._edits or not line.strip():
            return
        readline.add_history(line)
        append: Any = getattr(readline, "append_history_file", None)  # libedit has none
        if self._history is not None and append is not None:
            with contextlib.suppress(OSError):  # a full disk ends no chat
                append(1, self._history)
