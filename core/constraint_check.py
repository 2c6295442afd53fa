"""Constraints as llguidance compiles them, and the check that one compiles at all.

llguidance is an extra: it is imported when the first constraint comes. Router and workers compile with the
same limits, so what passes the door compiles at a worker too.
"""

import json
import re
from types import ModuleType
from typing import TYPE_CHECKING, Final, Never

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_SOURCE_BYTES: Final = 64 * 1024
"""UTF-8 bytes of a source."""
MAX_REGEX_BYTES: Final = 8 * 1024
"""Of a regular expression: the time to compile one grows faster than its size."""
MAX_RULES: Final = 1000
"""Lines of a grammar. The compiler recurses along chains of rules: 3000 overflow the stack of the process."""
MAX_SCHEMA_DEPTH: Final = 1500
"""JSON levels that a chain of references through a schema can have, for the same reason: 4000 overflow."""
MAX_INTERSECTED: Final = 6
"""Expressions of which a text must match all. Beyond a dozen, no fuel limit keeps the compiler from running
for minutes."""

_INITIAL_FUEL: Final = 100_000
_STEP_FUEL: Final = 50_000
_STEP_ITEMS: Final = 10_000
"""Of an ambiguous grammar's parse table: about 20 ms of the step that a whole batch shares."""
_GUIDANCE: Final = "x-guidance"
"""llguidance's own key in a schema, which is dropped: a client could set limits aside with it."""
_ONE_LINE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python prints it, which models have seen most of. Where white space was free, sampling spent its
tokens on it, and some models pad until max_tokens."""
_LITERAL: Final = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')


def load_llguidance() -> ModuleType:
    """Raises InvalidRequest where the extra is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            "constrained output needs llguidance, which is not installed on the server: "
            "run `pip install 'pdserve[structured]'` there"
        ) from error
    return llguidance


def parser_limits() -> "LLParserLimits":
    """Bounds on the effort of compiling and of each step: a large schema takes seconds on a busy core."""
    limits: LLParserLimits = load_llguidance().LLParserLimits(
        initial_lexer_fuel=_INITIAL_FUEL,
        step_lexer_fuel=_STEP_FUEL,
        step_max_items=_STEP_ITEMS,
        verbose_errors=False,
    )
    return limits


def check_constraint(constraint: Constraint) -> None:
    """Return if `constraint` compiles and some text satisfies it. Takes milliseconds, a large schema seconds.

    Raises InvalidRequest in the compiler's own words, or saying which limit the source is over.
    """
    grammar = grammar_of(constraint)
    llguidance = load_llguidance()
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte", slices=[]), grammar, log_level=0, limits=parser_limits()
    )
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        refuse(constraint, matcher.get_error())


def refuse(constraint: Constraint, error: str) -> Never:
    """Raises InvalidRequest with what llguidance says: its first line, and the reason if that is below."""
    lines = error.strip().splitlines() or ["unknown error"]
    if lines[0].startswith("NoExtension"):
        lines = ["no text satisfies it"]
    reasons = [line for line in lines[1:] if line.startswith("error:")]
    raise InvalidRequest(
        f"the {constraint.kind} constraint cannot be compiled: {' '.join([lines[0], *reasons[:1]])[:500]}"
    )


def grammar_of(constraint: Constraint) -> str:
    """The source in llguidance's own form. Raises InvalidRequest for one that is malformed or too large."""
    kind, source = constraint.kind, constraint.source
    limit = MAX_REGEX_BYTES if kind is ConstraintKind.REGEX else MAX_SOURCE_BYTES
    size = len(source.encode(errors="surrogatepass"))
    if size > limit:
        raise InvalidRequest(f"the {kind} constraint has {size} bytes, the limit is {limit}: make it simpler")
    matcher = load_llguidance().LLMatcher
    try:
        source.encode()
        grammar: str
        match kind:
            case ConstraintKind.JSON_SCHEMA:
                grammar = _schema_grammar(constraint)
            case ConstraintKind.JSON_OBJECT:
                grammar = matcher.grammar_from_json_schema('{"type":"object"}', _ONE_LINE)
            case ConstraintKind.REGEX:
                grammar = matcher.grammar_from_regex(source)
            case ConstraintKind.CHOICE:
                grammar = matcher.grammar_from_lark(_choice_lark(constraint))
            case ConstraintKind.GRAMMAR:
                _check_lark(constraint)
                grammar = matcher.grammar_from_lark(source)
    except (ValueError, RecursionError) as error:  # also lone surrogates
        refuse(constraint, str(error))
    return grammar


def _schema_grammar(constraint: Constraint) -> str:
    schema = _parse(constraint)
    if not isinstance(schema, dict | bool):
        refuse(constraint, f"a schema is an object or a boolean, not {type(schema).__name__}")
    if isinstance(schema, bool):
        if not schema:
            refuse(constraint, "no text satisfies it")
        schema = {}
    depth, keys = _survey(schema)
    targets = {str(members["$ref"]) for members in keys if "$ref" in members}
    if depth * (1 + len(targets)) > MAX_SCHEMA_DEPTH:
        refuse(
            constraint,
            f"it is {depth} levels deep and refers to {len(targets)} schemas, together "
            f"{depth * (1 + len(targets))} levels; the limit is {MAX_SCHEMA_DEPTH}",
        )
    intersects = any("allOf" in members or ("$ref" in members and len(members) > 1) for members in keys)
    expressions = sum(("pattern" in members) + ("format" in members) for members in keys)
    if intersects and expressions > MAX_INTERSECTED:
        refuse(
            constraint,
            f"it combines schemas (allOf, or keys beside $ref) and has {expressions} patterns and formats; "
            f"the limit for such is {MAX_INTERSECTED}",
        )
    schema.pop(_GUIDANCE, None)
    grammar: str = load_llguidance().LLMatcher.grammar_from_json_schema(json.dumps(schema), _ONE_LINE)
    return grammar


def _survey(value: object) -> tuple[int, list[dict[str, object]]]:
    """How many levels a JSON value has, and every object in it."""
    depth = 0
    objects: list[dict[str, object]] = []
    level = [value]
    while level:
        depth += 1
        inside = [part for part in level if isinstance(part, dict)]
        objects += inside
        lists = [part for part in level if isinstance(part, list)]
        level = [value for part in inside for value in part.values()]
        level += [value for part in lists for value in part]
    return depth, objects


def _choice_lark(constraint: Constraint) -> str:
    choices = _parse(constraint)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        refuse(constraint, "choices are a JSON array of at least one string")
    # One terminal: as alternatives of a rule, thousands would be over the parser's limit in the first step.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices)


def _check_lark(constraint: Constraint) -> None:
    lines = constraint.source.count("\n") + 1
    if lines > MAX_RULES:
        refuse(constraint, f"it has {lines} lines, the limit is {MAX_RULES}")
    intersections = _LITERAL.sub("", constraint.source).count("&")
    if intersections >= MAX_INTERSECTED:
        refuse(constraint, f"it has {intersections} intersections (&), the limit is {MAX_INTERSECTED - 1}")


def _parse(constraint: Constraint) -> object:
    """The source as JSON. Raises ValueError where it is none, RecursionError where it is too deep."""

    def reject(name: str) -> Never:
        raise ValueError(f"{name} is not JSON")

    value: object = json.loads(constraint.source, parse_constant=reject)
    return value
