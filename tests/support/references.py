"""The committed greedy references, see scripts/make_references.py."""

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "integration" / "references" / "smollm2_greedy.json"

QUICK = ("chat-capital", "code-python", "long-1600", "chinese", "emoji", "length-33")
"""One of each kind, for `make test`."""

QUICK_TOKENS = 24
"""Whatever the prompt's length, the last token is computed from a block that the completion began."""


@dataclass(frozen=True)
class Reference:
    """What transformers continues a prompt with, float32, greedily, end-of-text ignored."""

    name: str
    prompt: list[int]
    completion: list[int]


def references(names: tuple[str, ...] | None = None) -> list[Reference]:
    """All references, or those of the given names in that order."""
    cases = {case["name"]: case for case in json.loads(FILE.read_text())["cases"]}
    chosen = names if names is not None else tuple(cases)
    return [Reference(name, cases[name]["prompt"], cases[name]["completion"]) for name in chosen]
