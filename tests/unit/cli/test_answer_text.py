"""A model's text cannot command the user's terminal, and a pipe gets it as it is."""

import io
import sys

import pytest

from pdserve.cli.answer_text import write_answer


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_a_terminal_gets_no_control_codes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    screen, pipe = Screen(), io.StringIO()
    for out in (screen, pipe):
        monkeypatch.setattr(sys, "stdout", out)
        write_answer(f"a{chr(code)}b")
    assert screen.getvalue() == (f"a{chr(code)}b" if chr(code) in "\n\t" else "a�b")
    assert pipe.getvalue() == f"a{chr(code)}b"


def test_text_of_any_language_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Screen())
    write_answer("Grüß 你好 🙂 ا\u00a0")
    assert sys.stdout.getvalue() == "Grüß 你好 🙂 ا\u00a0"  # type: ignore[attr-defined]
