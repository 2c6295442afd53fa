"""Constrained completions are what was asked for, or stop at their length and say so."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from constrained_engine import Story, TinyStack
from tiny_model import make_tiny_model

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind, FinishReason, SamplingParams

SCHEMAS = 200
PATTERNS = ("^[a-f]{2,5}$", "^(yes|no)$", "^[A-Z][a-z]{0,4}-[0-9]{2}$", "^x+y?$")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TinyStack:
    return TinyStack(make_tiny_model(tmp_path_factory.mktemp("tiny")))


def constrained(kind: ConstraintKind, source: str, seed: int = 0, **fields: Any) -> SamplingParams:
    settings: dict[str, Any] = {"max_tokens": 160, "temperature": 1.0} | fields
    return SamplingParams(seed=seed, constraint=Constraint(kind, source), **settings)


def make_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Bounded everywhere, so that a model that means nothing comes to an end too."""
    kinds = ["integer", "number", "boolean", "null", "string", "pattern", "enum", "const", "anyOf"]
    match chance.choice(kinds if depth == 3 else [*kinds, *["object", "array"] * (9 if depth == 0 else 2)]):
        case "integer":
            low = chance.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 500)}
        case "number":
            return {"type": "number", "minimum": 0, "exclusiveMaximum": chance.choice([1, 2.5, 100])}
        case "string":
            low = chance.randint(0, 2)
            return {"type": "string", "minLength": low, "maxLength": low + chance.randint(0, 6)}
        case "pattern":
            return {"type": "string", "pattern": chance.choice(PATTERNS)}
        case "enum":
            return {"enum": chance.sample(["a", "b c", 'q"uote', 7, None, True, [1], {"k": "v"}, "é"], 3)}
        case "const":
            return {"const": chance.choice(["fixed", 3, [True, {"x": None}], "ünï"])}
        case "anyOf":
            options = [{"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 9}]
            return {"anyOf": chance.sample(options, 2)}
        case "array":
            low = chance.randint(0, 1)
            items = make_schema(chance, depth + 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + chance.randint(0, 2)}
        case "object":
            names = chance.sample(["id", "name", "tags", "with space", "ключ", "a/b"], chance.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: make_schema(chance, depth + 1) for name in names},
                "required": chance.sample(names, chance.randint(0, len(names))),
                "additionalProperties": False,
            }
        case kind:
            return {"type": kind}


def test_200_json_schemas_give_valid_json_or_an_honest_length_stop(stack: TinyStack) -> None:
    chance = random.Random(3)
    schemas = [make_schema(chance) for _ in range(SCHEMAS)]
    limits = [6 if number % 5 == 0 else 160 for number in range(SCHEMAS)]
    assert sum("properties" in json.dumps(schema) for schema in schemas) > SCHEMAS // 4
    asks = [
        ("Answer: ", constrained(ConstraintKind.JSON_SCHEMA, json.dumps(schema), seed, max_tokens=limit))
        for seed, (schema, limit) in enumerate(zip(schemas, limits, strict=True))
    ]
    complete = 0
    for schema, limit, story in zip(schemas, limits, stack.run(asks), strict=True):
        assert story.error is None
        if story.finish_reason is FinishReason.STOP:
            complete += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(story.text))
        else:
            assert (story.finish_reason, len(story.tokens)) == (FinishReason.LENGTH, limit)
    assert SCHEMAS // 2 <= complete < SCHEMAS


def test_a_json_object_is_one(stack: TinyStack) -> None:
    asks = [("{", constrained(ConstraintKind.JSON_OBJECT, "", seed)) for seed in range(12)]
    ended = [s for s in stack.run(asks) if s.finish_reason is FinishReason.STOP]
    assert ended
    assert all(isinstance(json.loads(story.text), dict) for story in ended)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_choices_give_one_of_them_and_stop(stack: TinyStack, temperature: float) -> None:
    choices = ["yes", "yes and no", "no", "не знаю", 'q"\n']
    asks = [
        ("?", constrained(ConstraintKind.CHOICE, json.dumps(choices), seed, temperature=temperature))
        for seed in range(24)
    ]
    stories = stack.run(asks)
    assert all(story.finish_reason is FinishReason.STOP for story in stories)
    texts = {story.text for story in stories}
    assert texts <= set(choices)
    assert len(texts) == 1 if temperature == 0.0 else len(texts) > 1


@pytest.mark.parametrize("expression", ["[a-c]{3,9}", "(ab|cd)+e", "[0-9]{4}-[0-9]{2}", "é?/x"])
def test_a_regex_matches_the_whole_text(stack: TinyStack, expression: str) -> None:
    asks = [("x", constrained(ConstraintKind.REGEX, expression, seed)) for seed in range(8)]
    for story in stack.run(asks):
        assert story.finish_reason is FinishReason.STOP
        assert re.fullmatch(expression, story.text)


def test_a_grammar_is_followed(stack: TinyStack) -> None:
    lark = 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'
    stories = stack.run([("x", constrained(ConstraintKind.GRAMMAR, lark, seed)) for seed in range(8)])
    assert all(re.fullmatch(r"<[a-z]{1,3}(,[a-z]{1,3})*>", story.text) for story in stories)


def test_a_text_that_can_only_stop_stops_without_a_further_token(stack: TinyStack) -> None:
    (story,) = stack.run([("x", constrained(ConstraintKind.CHOICE, '["abc"]'))])
    assert (story.text, len(story.tokens), story.finish_reason) == ("abc", 3, FinishReason.STOP)


@pytest.mark.parametrize("fields", [{"min_tokens": 8}, {"ignore_eos": True}])
def test_a_finished_constraint_ends_whatever_else_was_asked(stack: TinyStack, fields: dict[str, Any]) -> None:
    asks = [
        ("x", constrained(ConstraintKind.CHOICE, choices, **fields)) for choices in ('["a", "ab"]', '[""]')
    ]
    longest, empty = stack.run(asks)
    assert (longest.text, longest.finish_reason) == ("ab", FinishReason.STOP)
    assert (empty.text, empty.finish_reason) == ("", FinishReason.STOP)


MIX = [
    constrained(ConstraintKind.REGEX, "[a-z ]{60,80}", 1),
    constrained(ConstraintKind.JSON_OBJECT, "", 2, max_tokens=90, repetition_penalty=1.3),
    SamplingParams(max_tokens=70, temperature=1.0, seed=3, frequency_penalty=0.4, min_tokens=70),
    constrained(ConstraintKind.REGEX, "(ab|ba|c){40,60}", 4, presence_penalty=0.6, logprobs=1),
    SamplingParams(max_tokens=70, repetition_penalty=1.2, ignore_eos=True, logprobs=3),
    constrained(ConstraintKind.JSON_SCHEMA, '{"type":"array","minItems":30}', 6, max_tokens=90),
]
PROMPTS = [f"prompt {number} " * 3 for number in range(len(MIX))]


@pytest.fixture(scope="module")
def undisturbed(stack: TinyStack) -> list[Story]:
    return [stack.run([ask], padded=False)[0] for ask in zip(PROMPTS, MIX, strict=True)]


@pytest.mark.parametrize("pool_blocks", [512, 16])
def test_neighbours_and_preemption_change_no_token(
    stack: TinyStack, undisturbed: list[Story], pool_blocks: int
) -> None:
    stories = stack.run(list(zip(PROMPTS, MIX, strict=True)), pool_blocks, padded=False)
    assert (stack.preemptions > 0) == (pool_blocks == 16)
    for story, expected in zip(stories, undisturbed, strict=True):
        assert (story.tokens, story.text) == (expected.tokens, expected.text)
        assert story.finish_reason is expected.finish_reason
        assert story.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("cut", [1, 17, 59])
def test_a_resumed_sequence_goes_on_with_the_same_tokens(
    stack: TinyStack, undisturbed: list[Story], cut: int
) -> None:
    prior = [story.tokens[:cut] for story in undisturbed]
    stories = stack.run(list(zip(PROMPTS, MIX, strict=True)), prior=prior, padded=False)
    assert [story.tokens for story in stories] == [story.tokens[cut:] for story in undisturbed]
    assert [s.finish_reason for s in stories] == [s.finish_reason for s in undisturbed]


def test_choices_that_fork_one_constraint_do_not_disturb_each_other(stack: TinyStack) -> None:
    source = Constraint(ConstraintKind.REGEX, "[ab]{12}")
    first, second = stack.compiler.matcher(source), stack.compiler.matcher(source)
    for token in stack.tokenizer.encode("abababababab"):
        first.take(token)
    assert (first.is_complete, second.is_complete) == (True, False)


def test_a_bad_constraint_ends_its_own_sequence_alone(stack: TinyStack) -> None:
    asks = [
        ("x", constrained(ConstraintKind.REGEX, "a(")),
        ("x", constrained(ConstraintKind.CHOICE, '["fine"]')),
        ("x", constrained(ConstraintKind.REGEX, "(a{1000}){1000}")),
    ]
    malformed, fine, boundless = stack.run(asks)
    assert malformed.error is not None
    assert "unclosed group" in malformed.error
    assert fine.text == "fine"
    assert boundless.error is not None
    assert "too many expressions" in boundless.error


def test_prior_tokens_that_break_the_constraint_are_refused(stack: TinyStack) -> None:
    params = constrained(ConstraintKind.REGEX, "[ab]{5}")
    (story,) = stack.run([("x", params)], prior=[stack.tokenizer.encode("zz")])
    assert story.error is not None
    assert "cannot go on" in story.error


def test_a_tokenizer_that_llguidance_does_not_know_refuses_constraints_and_nothing_else() -> None:
    from pdserve.workers.engine.constraint import ConstraintCompiler

    compiler = ConstraintCompiler(
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', 1, frozenset()
    )
    with pytest.raises(InvalidRequest, match="tokenizer"):
        compiler.matcher(Constraint(ConstraintKind.REGEX, "a"))


def test_thousands_of_choices_are_one_constraint(stack: TinyStack) -> None:
    choices = [f"item {number:05d}" for number in range(0, 90_000, 23)]
    asks = [("x", constrained(ConstraintKind.CHOICE, json.dumps(choices), seed)) for seed in range(3)]
    assert {story.text for story in stack.run(asks)} <= set(choices)
