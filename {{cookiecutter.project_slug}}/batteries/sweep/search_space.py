"""The options that a sweep varies: `stages.0.lr=log(1e-4,1e-2)`, `mixup=0..0.4`, `optimizer=adamw|sgd`."""

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batteries.core.config_io import flatten, from_json, to_json
from batteries.core.errors import UserError
from batteries.core.text import did_you_mean, find_repeated
from batteries.sweep.optional_import import import_optuna

FORMS = "NAME=low..high, NAME=low..high:step, NAME=log(low,high) or NAME=a|b|c"
# Options that the sweep sets for each trial.
OF_THE_SWEEP = ("logdir", "resume", "report")
# Options that change what the score measures, so that scores of trials could not be compared.
OF_THE_SCORE = ("main_metric", "minimize_metric", "seed", "fold", "split_file", "data_dir")


@dataclass(frozen=True)
class SearchedOption:
    """An option that is varied.

    Attributes:
        name: Its name, such as stages.0.lr.
        text: How it was given.
        choices: The values, if they are listed.
        low: The lower bound, if there are no choices.
        high: The upper bound, included.
        step: The distance of two values, or None.
        is_log: Whether the logarithm is drawn uniformly.
        is_integer: Whether values are integers.
    """

    name: str
    text: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    is_log: bool = False
    is_integer: bool = False

    def distribution(self) -> Any:
        """Return the distribution of Optuna."""
        distributions = import_optuna().distributions
        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if self.is_integer:
            step = 1 if self.step is None else int(self.step)
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.is_log, step=step)
        return distributions.FloatDistribution(self.low, self.high, log=self.is_log, step=self.step)

    def grid(self) -> list[Any]:
        """List all values. Raises UserError if their number is not finite."""
        if self.choices:
            return list(self.choices)
        step = 1 if self.step is None and self.is_integer and not self.is_log else self.step
        if step is None:
            raise UserError(f"--search {self.text} has no finite number of values for a grid; give a|b|c, or a step.")
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + number * step for number in range(count)]
        return [round(value) for value in values] if self.is_integer else values

    def position(self, value: Any) -> float:
        """Return where a value is between the bounds, 0 to 1."""
        if self.choices:
            return self.choices.index(value) / (len(self.choices) - 1)
        scale = math.log if self.is_log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(value) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the positions and the texts of the values that a plot shows."""
        return [(self.position(value), format_value(value)) for value in self.choices or (self.low, self.high)]


def format_value(value: Any) -> str:
    """Format the value of an option."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse_search(texts: Sequence[str], base: Any) -> list[SearchedOption]:
    """Parse the values of --search.

    Args:
        texts: Such as `mixup=0..0.4`.
        base: The Config that the trials change.

    Raises:
        UserError: If an option does not exist, its values have another form, an invalid type or bound, or no value.
    """
    if not texts:
        raise UserError(f"--search is missing; give what to vary, as {FORMS}.")
    options = [_parse_option(text, base) for text in texts]
    if repeated := find_repeated(option.name for option in options):
        raise UserError(f"--search {repeated[0]} is given twice; give each option once.")
    return options


def _parse_option(text: str, base: Any) -> SearchedOption:
    name, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not spec:
        raise UserError(f"--search {text} has no values; give {FORMS}.")
    name = name.removeprefix("--").replace("-", "_")
    known = [known_name for known_name, _ in flatten(to_json(base))]
    if name not in known:
        same_end = [known_name for known_name in known if known_name.endswith(f".{name}")]
        hint = f"; did you mean {same_end[0]!r}?" if same_end else did_you_mean(name, known) or "."
        raise UserError(f"--search {text}: {name} is not an option of train.py{hint}")
    if name in OF_THE_SWEEP:
        raise UserError(f"--search {text}: --{name} is set by the sweep; leave it out.")
    if name in OF_THE_SCORE:
        raise UserError(f"--search {text}: scores of trials with another {name} cannot be compared; leave it out.")
    if isinstance(dict(flatten(to_json(base)))[name], list):
        raise UserError(f"--search {text}: {name} is a list of values, which cannot be searched; give it after `--`.")
    option = _parse_values(name, text, spec)
    if option.choices:
        for value in option.choices:
            check_value(base, text, name, value)
        return option
    return _check_range(option, base)


def _parse_values(name: str, text: str, spec: str) -> SearchedOption:
    """Parse what follows `=`, without its type."""
    if match := re.fullmatch(r"log\(([^,]+),([^,]+)\)", spec.replace(" ", "")):
        low, high = (_number(text, part) for part in match.groups())
        if low <= 0:
            raise UserError(f"--search {text}: the lower bound {low:g} of a logarithmic range must be greater than 0.")
        return SearchedOption(name, text, low=low, high=high, is_log=True)
    if match := re.fullmatch(r"([^|]+?)\.\.([^:|]+)(?::([^|]+))?", spec):
        low, high = (_number(text, part) for part in match.groups()[:2])
        step = None if match[3] is None else _number(text, match[3])
        if step is not None and step <= 0:
            raise UserError(f"--search {text}: the step {step:g} must be greater than 0.")
        return SearchedOption(name, text, low=low, high=high, step=step)
    if spec.startswith("log("):
        raise UserError(f"--search {text}: log takes two bounds, such as log(1e-4,1e-2).")
    choices = tuple(_plain_value(part.strip()) for part in spec.split("|"))
    if len(choices) < 2:
        raise UserError(f"--search {text} has one value; give {FORMS}.")
    if repeated := find_repeated(map(str, choices)):
        raise UserError(f"--search {text} has the value {repeated[0]} twice.")
    return SearchedOption(name, text, choices=choices)


def _number(text: str, part: str) -> float:
    try:
        number = float(part)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--search {text}: {part.strip()} is not a number; give {FORMS}.")
    return number


def _plain_value(text: str) -> Any:
    """Return a number, true, false or none; other text is unchanged."""
    try:
        value = json.loads({"none": "null", "None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _check_range(option: SearchedOption, base: Any) -> SearchedOption:
    """Check the bounds. An option is an integer if it does not accept a fraction."""
    if option.low >= option.high:
        raise UserError(
            f"--search {option.text} is empty: the lower bound {option.low:g} must be less than {option.high:g}."
        )
    fraction = option.low + (option.high - option.low) / math.pi
    try:
        check_value(base, option.text, option.name, fraction)
        is_integer = False
    except UserError:
        is_integer = True
    numbers = [option.low, option.high, *([] if option.step is None else [option.step])]
    for number in numbers[:2]:
        check_value(base, option.text, option.name, int(number) if is_integer else number)
    if is_integer and (fractions := [number for number in numbers if number != int(number)]):
        raise UserError(f"--search {option.text}: {fractions[0]:g} is not an integer, which {option.name} must be.")
    if option.step is not None:
        steps = (option.high - option.low) / option.step
        if abs(steps - round(steps)) > 1e-9 * max(steps, 1):
            raise UserError(
                f"--search {option.text}: the step {option.step:g} must divide the range, so that {option.high:g} is a "
                "value."
            )
    return SearchedOption(**{**vars(option), "is_integer": is_integer})


def check_value(base: Any, text: str, name: str, value: Any) -> None:
    """Raise UserError if an option does not accept a value."""
    try:
        from_json(type(base), with_values(base, {name: value}), "the config")
    except UserError as error:
        reason = str(error).removeprefix("the config: ")
        raise UserError(f"--search {text}: {reason}") from None


def with_values(base: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Config as JSON values, with other values for some options, by their names, such as stages.0.lr."""
    changed = copy.deepcopy(to_json(base))
    for name, value in values.items():
        *path, last = name.split(".")
        place: Any = changed
        for part in path:
            place = place[int(part)] if part.isdigit() else place[part]
        place[last] = value
    return changed


def grid_points(options: Sequence[SearchedOption]) -> Iterator[dict[str, Any]]:
    """List all combinations of values, the last option changing fastest."""
    for values in itertools.product(*(option.grid() for option in options)):
        yield {option.name: value for option, value in zip(options, values, strict=True)}
