"""Compare two recipes, each trained several times.

    python tools/compare.py logs/a logs/b        # directories of runs, such as those of scripts/train_seeds.sh
    python tools/compare.py logs/a               # one recipe: the mean, its deviation and a confidence interval

Runs are paired by seed and fold. If all of them have predictions (tools/predict.py), the samples are compared too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.text import count_of, did_you_mean
from batteries.core.validators import check_ranges
from batteries.evaluation.comparison import (
    MIN_BOOTSTRAP_PAIRS,
    POWER,
    Interval,
    Method,
    SampleComparison,
    compare_samples,
    confidence_interval,
    pairs_needed,
)
from batteries.evaluation.repeated_runs import Recipe, RepeatKey, overlap_of, pair_runs, read_recipe
from batteries.report.history import find_runs


@dataclass(frozen=True)
class Options:
    """Compare two recipes by their repeated runs, or summarise one."""

    runs: Positional[tuple[Path, ...]]  # one or two directories: a run, or a directory of the runs of a recipe
    method: Method = "t"  # the interval over pairs: Student's t, or a BCa bootstrap, for about 20 pairs or more
    confidence: float = 0.95  # confidence level of the intervals
    split: str = "valid"  # whose samples are compared: the name of the files in predictions/, such as valid or test

    def __post_init__(self) -> None:
        """Validate the options."""
        check_ranges(self)
        if len(self.runs) not in (1, 2):
            raise UserError(f"{len(self.runs)} directories are given; give one or two.")
        if not 0 < self.confidence < 1:
            raise UserError(f"--confidence {self.confidence:g} must be greater than 0 and less than 1.")


def main(options: Options) -> None:
    """Print the comparison."""
    recipes = [read_recipe(str(path), find_runs([path])) for path in options.runs]
    if len(recipes) == 1:
        print("\n".join(describe_recipe(recipes[0], options.confidence)))
        return
    first, second = recipes
    keys, differences = pair_runs(first, second)
    overlap = overlap_of(first, keys)
    check_method(options.method, len(keys), overlap)
    interval = confidence_interval(differences, options.confidence, method=options.method, overlap=overlap)
    samples = compare_predictions(recipes, keys, options)
    for key, difference in zip(keys, differences.tolist(), strict=True):
        print(f"{key}  {first.metric} {first.scores[key]:.4f} and {second.scores[key]:.4f}  {difference:+.4f}")
    mean = describe_interval(interval, options.confidence)
    print(f"{second.name} minus {first.name}: {mean}, {count_of(len(keys), 'pair')}")
    print(verdict_on_pairs(first, second, differences, interval, options.confidence, overlap))
    print("\n".join(samples))


def check_method(method: Method, pairs: int, overlap: float) -> None:
    """Raise UserError if the bootstrap is not possible for these pairs."""
    if method != "bootstrap":
        return
    if overlap:
        raise UserError(
            "--method bootstrap has no correction for folds, whose train splits overlap; use --method t, or compare "
            "the runs of one fold."
        )
    if pairs < MIN_BOOTSTRAP_PAIRS:
        raise UserError(
            f"--method bootstrap needs {MIN_BOOTSTRAP_PAIRS} pairs or more, and there are {pairs}; use --method t."
        )


def compare_predictions(recipes: Sequence[Recipe], keys: Sequence[RepeatKey], options: Options) -> list[str]:
    """Return the lines on the samples that both recipes predicted.

    Raises:
        UserError: If the predictions of a pair of runs do not have the same samples, or no run has the split.
    """
    files = [[predictions_of(recipe, key, options.split) for key in keys] for recipe in recipes]
    exists = [path.is_file() for side in files for path in side]
    if all(exists):
        comparisons = compare_samples(*files, confidence=options.confidence)
        return [describe_samples(comparison, options.confidence) for comparison in comparisons]
    if options.split != "valid" and not any(exists):
        found = {path.stem for side in files for file in side for path in file.parent.glob("*.csv")}
        hint = did_you_mean(options.split, found) or "; write it with tools/predict.py."
        raise UserError(f"--split {options.split}: no run has predictions/{options.split}.csv{hint}")
    return [f"Samples are not compared: not all runs have predictions/{options.split}.csv (tools/predict.py)."]


def predictions_of(recipe: Recipe, key: RepeatKey, split: str) -> Path:
    """Return the path of the predictions of one run."""
    return recipe.directories[key] / "predictions" / f"{split}.csv"


def describe_recipe(recipe: Recipe, confidence: float = 0.95) -> list[str]:
    """Return a line for each run, and the mean with standard deviation and confidence interval."""
    lines = [f"{key}  {recipe.metric} {score:.4f}" for key, score in recipe.scores.items()]
    values = np.array(list(recipe.scores.values()))
    interval = confidence_interval(values, confidence, overlap=overlap_of(recipe, recipe.scores))
    mean = f"mean of {count_of(len(values), 'run')}  {recipe.metric} {interval.mean:.4f}"
    if len(values) > 1:
        mean += (
            f"  standard deviation {values.std(ddof=1):.4f}  {100 * confidence:g} % interval {interval.low:.4f} to "
            f"{interval.high:.4f}"
        )
    return [*lines, mean]


def verdict_on_pairs(
    first: Recipe,
    second: Recipe,
    differences: np.ndarray,
    interval: Interval,
    confidence: float,
    overlap: float = 0.0,
) -> str:
    """Return in words whether one recipe is better; `overlap` is that of the interval."""
    if not differences.any():
        return "The runs do not differ: all pairs have equal scores."
    if len(differences) == 1:
        return "One pair does not show how much scores vary; train both with several seeds (scripts/train_seeds.sh)."
    if interval.excludes_zero:
        better = first if (interval.mean > 0) == first.minimize else second
        return f"{better.name} is better."
    needed = pairs_needed(differences, confidence, overlap=overlap)
    power = f"({100 * POWER:g} % power)"
    more = ""
    if needed:
        more = f" An effect of this size would need about {count_of(needed, 'pair')} {power}."
    elif overlap and differences.mean():
        more = f" No number of pairs of these folds would show an effect of this size {power}."
    return f"The runs do not show a difference.{more}"


def describe_samples(comparison: SampleComparison, confidence: float = 0.95) -> str:
    """Return one line on the samples that both recipes predicted."""
    mean = describe_interval(comparison.interval, confidence)
    text = f"{comparison.metric} of {count_of(comparison.samples, 'sample')}: {mean}"
    if comparison.p_value is None:
        shows = comparison.interval.excludes_zero
    else:
        shows = comparison.p_value < 1 - confidence
        text += (
            f"; only the first is correct for {comparison.only_first}, only the second for {comparison.only_second}, "
            f"p = {comparison.p_value:.3g} (McNemar)"
        )
    return f"{text}; {'a difference' if shows else 'no difference is shown'}"


def describe_interval(interval: Interval, confidence: float) -> str:
    """Return a mean difference with its interval."""
    if math.isnan(interval.low):
        return f"{interval.mean:+.4f}"
    return f"{interval.mean:+.4f} ({100 * confidence:g} % interval {interval.low:+.4f} to {interval.high:+.4f})"


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
