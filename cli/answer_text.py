"""How a model's text reaches the user."""

import sys

_CONTROLS = {code: "�" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def write_answer(text: str) -> None:
    """Print a piece of an answer at once. A terminal gets no control codes: they could be commands to it."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()
