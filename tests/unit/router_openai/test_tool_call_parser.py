"""Tool calls are found in text however it is cut into pieces, and no half marker is ever shown."""

import json
import random
from collections.abc import Sequence

import pytest

from pdserve.router.openai.tool_calls import BEGIN, END, ToolCallParser


def parse(
    pieces: Sequence[str], *, bare: bool = False, parallel: bool = True
) -> tuple[str, list[tuple[str, str]], list[str]]:
    """(content, [(name, arguments)], the contents as they were shown)."""
    parser = ToolCallParser(bare=bare, parallel=parallel)
    deltas = [parser.push(piece) for piece in pieces]
    deltas.append(parser.finish())
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        for call in delta.calls:
            if call.name is not None:
                assert call.index == len(calls)
                calls.append((call.name, call.arguments))
            else:
                assert call.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    shown = [delta.content for delta in deltas]
    assert parser.calls == len(calls)
    return "".join(shown), calls, shown


def cut(text: str, seed: int) -> list[str]:
    """`text` in pieces of one to six characters."""
    draw, pieces = random.Random(seed), []
    while text:
        length = draw.randint(1, 6)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


CALL = BEGIN + '\n{"name": "weather", "arguments": {"city": "Paris", "days": [1, {"a": "}"}]}}\n' + END
ARGUMENTS = '{"city": "Paris", "days": [1, {"a": "}"}]}'
OTHER_ORDER = BEGIN + '{"arguments": {"x": "</tool_call>"}, "name": "f"}' + END
CASES = {
    "no call": ("just text < with <tool signs", "just text < with <tool signs", []),
    "one call": (CALL, "", [("weather", ARGUMENTS)]),
    "text before": ("Let me see.\n\n" + CALL, "Let me see.", [("weather", ARGUMENTS)]),
    "two calls": (CALL + "\n" + CALL, "", [("weather", ARGUMENTS)] * 2),
    "text after": (CALL + " and so", " and so", [("weather", ARGUMENTS)]),
    "another order": (OTHER_ORDER, "", [("f", '{"x": "</tool_call>"}')]),
    "an end marker in a text": (
        BEGIN + '{"name": "f", "arguments": {"x": "\\"</tool_call>\\\\"}}' + END,
        "",
        [("f", '{"x": "\\"</tool_call>\\\\"}')],
    ),
    "no arguments": (BEGIN + '{"name": "f"}' + END, "", [("f", "{}")]),
    "arguments as a text": (BEGIN + '{"name":"f","arguments":"{\\"a\\":1}"}' + END, "", [("f", '{"a":1}')]),
    "no JSON": ("a" + BEGIN + "nonsense" + END, "a" + BEGIN + "nonsense" + END, []),
    "cut off in the arguments": (CALL[:60], "", [("weather", ARGUMENTS[: 60 - CALL.index(ARGUMENTS)])]),
    "cut off before the name": (BEGIN + '\n{"na', BEGIN + '\n{"na', []),
    "cut off in the marker": ("text <tool_ca", "text <tool_ca", []),
    "cut off after the arguments": (CALL[: -len(END)], "", [("weather", ARGUMENTS)]),
    "white space only": (" \n ", " \n ", []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_is_found_however_the_text_is_cut(case: str) -> None:
    text, content, calls = CASES[case]
    for seed in range(40):
        found = parse(cut(text, seed))
        assert found[:2] == (content, calls), seed
    assert parse([text])[:2] == (content, calls)
    assert parse(list(text))[:2] == (content, calls)


def test_no_part_of_a_marker_is_shown_before_a_call() -> None:
    for seed in range(100):
        parser = ToolCallParser()
        shown = ""
        for piece in cut("Hello < world <too " + CALL + "\n and <" + CALL, seed):
            shown += parser.push(piece).content
            assert "Hello < world <too\n and <".startswith(shown), seed


def test_text_that_cannot_become_a_marker_is_shown_at_once() -> None:
    parser = ToolCallParser()
    assert parser.push("Hello").content == "Hello"
    assert parser.push(" there").content == " there"
    assert parser.push(" <tool").content == ""
    assert parser.push("box>").content == " <toolbox>"


def test_arguments_are_passed_on_while_they_come() -> None:
    parser = ToolCallParser()
    (first,) = parser.push(BEGIN + '{"name": "f", "arguments": {"x": ').calls
    assert (first.name, first.arguments) == ("f", '{"x": ')
    (second,) = parser.push("12").calls
    assert (second.name, second.arguments) == (None, "12")
    (third,) = parser.push("}}" + END).calls
    assert third.arguments == "}"
    assert parser.push("").calls == []


def test_without_parallel_calls_what_follows_the_first_is_dropped() -> None:
    content, calls, _ = parse(cut(CALL + "\n" + CALL + " more", 3), parallel=False)
    assert (content, calls) == ("", [("weather", ARGUMENTS)])


def test_a_bare_answer_is_one_call() -> None:
    for seed in range(40):
        content, calls, _ = parse(cut('{"name":"f","arguments":{"a":[1,2]}}', seed), bare=True)
        assert (content, calls) == ("", [("f", '{"a":[1,2]}')])


def test_a_bare_answer_that_is_cut_off_before_its_name_is_text() -> None:
    assert parse(['{"nam'], bare=True)[:2] == ('{"nam', [])


def test_random_json_arguments_survive_every_cut() -> None:
    draw = random.Random(0)

    def value(depth: int) -> object:
        kind = draw.randrange(6 if depth else 4)
        match kind:
            case 0:
                return draw.choice(["", '"', "\\", "}", "{", "</tool_call>", "ü\n", "[", "a\\\\"])
            case 1:
                return draw.randint(-9, 9)
            case 2:
                return draw.choice([True, None, 1.5])
            case 3 | 4:
                return [value(depth - 1) for _ in range(draw.randrange(3))] if depth else 0
            case _:
                return {draw.choice('abc{"\\'): value(depth - 1) for _ in range(draw.randrange(3))}

    for seed in range(300):
        arguments = {"x": value(3)}
        call = {"name": "f", "arguments": arguments}
        text = "so: " + BEGIN + json.dumps(call, ensure_ascii=seed % 2 == 0) + END
        content, calls, _ = parse(cut(text, seed))
        assert content == "so:"
        assert [(name, json.loads(given)) for name, given in calls] == [("f", arguments)], text
