"""A command in a pseudo-terminal of its own, as a user has it."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pexpect.fdpexpect import fdspawn

EXPECT_S = 30.0
_TAKE_TERMINAL = 'terminal=$1; shift; exec "$@" <"$terminal" >"$terminal" 2>&1'
"""The first terminal that the leader of a session opens controls it: Ctrl-C becomes a signal."""


class Terminal:
    """Not pexpect.spawn, which forks: a fork of a process with gRPC's threads can hang before it becomes
    the command. Use as a context manager: the command ends with it.
    """

    def __init__(
        self, *command: str | Path, env: Mapping[str, str] | None = None, rows: int = 24, columns: int = 100
    ) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._popen = subprocess.Popen(
            ["/bin/sh", "-c", _TAKE_TERMINAL, "sh", os.ttyname(slave), *command],
            env={**os.environ, "TERM": "xterm", **(env or {})},
            start_new_session=True,
        )
        # The slave stays open here until the command has it: without a holder, the master reads an end.
        self._slave: int | None = slave
        self._screen = fdspawn(master, encoding="utf-8", timeout=EXPECT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
        self._let_go()
        self._screen.close()

    def expect(self, *texts: str) -> str:
        """Wait for these texts, one after the other; what came before the last of them."""
        for text in texts:
            self._screen.expect_exact(text)
        self._let_go()
        return str(self._screen.before)

    def type(self, text: str) -> None:
        self._screen.send(text)

    def line(self, text: str) -> None:
        """Type and press Enter."""
        self._screen.send(f"{text}\r")

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._screen.send("\x03")

    def end_input(self) -> None:
        """Press Ctrl-D."""
        self._screen.send("\x04")

    def ended(self) -> tuple[int, str]:
        """Wait for the command's end: its exit status, and what it still printed."""
        self._let_go()
        printed = str(self._screen.read())
        return self._popen.wait(EXPECT_S), printed

    def _let_go(self) -> None:
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
