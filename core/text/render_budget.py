"""What one rendering of a template may cost: jinja's sandbox bounds neither time nor output."""

from collections.abc import Iterable, Iterator
from typing import Any, Final

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.core.errors import InvalidRequest

MAX_STEPS: Final = 1_000_000
"""Turns of loops and numbers of ranges count one, calls more: all of it takes less than a second."""
_CALL_STEPS: Final = 10
MAX_CHARACTERS: Final = 8 * 1024 * 1024
_KEY: Final = "render budget"
"""In the template's variables: no template can name it."""
_LOOP_FILTER: Final = "render_budget_each"


class RenderBudget:
    """Counts down during one rendering. Every method raises InvalidRequest once too much was spent."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._characters = MAX_CHARACTERS

    def spend(self, steps: int = 1) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise InvalidRequest(
                f"the model's chat template takes more than {MAX_STEPS} steps for these messages: send fewer"
            )

    def join(self, pieces: Iterable[str]) -> str:
        """The whole output."""
        kept: list[str] = []
        for piece in pieces:
            self._characters -= len(piece)
            if self._characters < 0:
                raise InvalidRequest(
                    f"the model's chat template writes more than {MAX_CHARACTERS} characters for these "
                    "messages: send less"
                )
            kept.append(piece)
        return "".join(kept)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, in which `template` gives templates that keep to a budget."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_LOOP_FILTER] = _each
        self.globals["range"] = _range

    def template(self, source: str) -> "BudgetedTemplate":
        """Compile. Raises whatever jinja and Python raise for what is no template."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _LOOP_FILTER, [], [], None, None, lineno=loop.lineno)
        return BudgetedTemplate(self, tree)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes here."""
        _budget_of(context).spend(_CALL_STEPS)
        return super().call(context, function, *args, **kwargs)


class BudgetedTemplate:
    """A compiled template."""

    def __init__(self, environment: BudgetedEnvironment, tree: nodes.Template) -> None:
        self._template = environment.from_string(tree)

    def render(self, **variables: object) -> str:
        """Raises InvalidRequest past the budget, and whatever the template raises."""
        budget = RenderBudget()
        return budget.join(self._template.generate({**variables, _KEY: budget}))


def _budget_of(context: Context) -> RenderBudget:
    budget = context.parent[_KEY]
    assert isinstance(budget, RenderBudget)
    return budget


@pass_context
def _each(context: Context, values: Iterable[object]) -> Iterator[object]:
    """What a loop goes over."""
    budget = _budget_of(context)
    for value in values:
        budget.spend()
        yield value


@pass_context
def _range(context: Context, *bounds: int) -> range:
    numbers = range(*bounds)
    _budget_of(context).spend(len(numbers))
    return numbers
