"""What compiles passes the door; what does not is refused in the compiler's words; nothing takes long."""

import json
import sys

import llguidance
import pytest

from pdserve.core.constraint_check import MAX_SOURCE_BYTES, check_constraint, grammar_of, parser_limits
from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind

SCHEMA, OBJECT, REGEX = ConstraintKind.JSON_SCHEMA, ConstraintKind.JSON_OBJECT, ConstraintKind.REGEX
CHOICE, GRAMMAR = ConstraintKind.CHOICE, ConstraintKind.GRAMMAR


def hard(number: int) -> str:
    """An expression whose intersections have exponentially many states."""
    return f"(a|b)*a(a|b){{{number}}}(a|b)*"


def chain(count: int, nested: int) -> str:
    """A schema of `count` definitions, each `nested` levels above the next."""
    definitions: dict[str, object] = {f"a{count}": {"type": "string"}}
    for number in range(count):
        link: object = {"$ref": f"#/$defs/a{number + 1}"}
        for _ in range(nested):
            link = {"items": link}
        definitions[f"a{number}"] = link
    return json.dumps({"$ref": "#/$defs/a0", "$defs": definitions}, separators=(",", ":"))


RULES = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "a"'


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (SCHEMA, "{}"),
        (SCHEMA, "true"),
        (SCHEMA, '{"type": "object", "properties": {"a": {"$ref": "#"}}}'),
        (SCHEMA, chain(40, 8)),
        (OBJECT, ""),
        (REGEX, "[a-z]+/é"),
        (REGEX, ""),
        (CHOICE, '["a", "", "\\u00e9\\n\\"", "start: x"]'),
        (GRAMMAR, 'start: "a" | start "b"'),
        (GRAMMAR, 'start: "&&&&&&&&" /&&&&&&&/ // &&&&&&&&&'),
    ],
)
def test_what_compiles_passes(kind: ConstraintKind, source: str) -> None:
    check_constraint(Constraint(kind, source))


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2], "b": {"c": null}}', '{"a":[1]}', '{"a": [1]\n}', '{"a":  [1]}']
)
def test_json_is_on_one_line_whatever_options_the_schema_carries(text: str) -> None:
    spaced = text == json.dumps(json.loads(text))
    assert matches(Constraint(OBJECT, ""), text) is spaced
    schema: dict[str, object] = {"type": "object"}
    assert matches(Constraint(SCHEMA, json.dumps(schema)), text) is spaced
    free = {**schema, "x-guidance": {"whitespace_flexible": True}}
    assert matches(Constraint(SCHEMA, json.dumps(free)), text) is spaced


def matches(constraint: Constraint, text: str) -> bool:
    grammar, tokenizer = grammar_of(constraint), llguidance.LLTokenizer("byte", slices=[])
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        (SCHEMA, "{", "Expecting property name"),
        (SCHEMA, "[1]", "an object or a boolean, not list"),
        (SCHEMA, "false", "no text satisfies it"),
        (SCHEMA, '{"const": NaN}', "NaN is not JSON"),
        (SCHEMA, '{"type": "foo"}', "Invalid type: foo"),
        (SCHEMA, '{"not": {}}', "Unimplemented keys"),
        (SCHEMA, '{"type": "number", "minimum": 5, "maximum": 3}', "Unsatisfiable schema"),
        (SCHEMA, '{"$ref": "http://example.org/x"}', "Resource"),
        (SCHEMA, '{"items":' * 900 + "{}" + "}" * 900, "recursion"),
        (SCHEMA, chain(85, 60), "the limit is 1500"),
        (SCHEMA, json.dumps({"allOf": [{"pattern": hard(i)} for i in range(25)]}), "the limit for such is 6"),
        (SCHEMA, '}}, {"lark_grammar": "start: /.*/"', "cannot be compiled"),
        (REGEX, "a(", "unclosed group"),
        (REGEX, "(?=a)b", "look-around"),
        (REGEX, "\ud800", "surrogates"),
        (REGEX, "a" * 9000, "9000 bytes, the limit is 8192"),
        (CHOICE, "[]", "at least one string"),
        (CHOICE, '{"a": 1}', "at least one string"),
        (CHOICE, '["a", 1]', "at least one string"),
        (CHOICE, "[" * 30_000, "recursion"),
        (GRAMMAR, "", "Empty grammar"),
        (GRAMMAR, "start: x", "unknown name"),
        (GRAMMAR, "start: start", "no text satisfies it"),
        (GRAMMAR, RULES[:60_000], "lines, the limit is 1000"),
        (GRAMMAR, "start: T\nT: " + " & ".join(f"/{hard(i)}/" for i in range(25)), "24 intersections"),
        (GRAMMAR, "start: " + "(" * 20_000, "cannot be compiled"),
        (GRAMMAR, "x" * (MAX_SOURCE_BYTES + 1), "65537 bytes, the limit is 65536"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(
    kind: ConstraintKind, source: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_constraint(Constraint(kind, source))
    assert reason in refusal.value.message
    assert f"the {kind} constraint" in refusal.value.message
    assert "\n" not in refusal.value.message


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'pdserve\[structured\]'"):
        check_constraint(Constraint(OBJECT, ""))
