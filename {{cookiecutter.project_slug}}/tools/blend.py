"""Blend the predictions of several models.

    python tools/blend.py logs/{a,b}/predictions/test.csv --output logs/blend/predictions/test.csv

Rows are matched by id and columns by class, in any order. `--fit-on` finds the weights on out-of-fold predictions of
the same models, and prints the loss that cross-validation estimates for them. Masks are blended by their probabilities,
which tools/predict.py writes with `--probabilities`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.evaluation.mask_table import is_mask_table, read_mask_table
from batteries.evaluation.predictions import (
    Kind,
    Predictions,
    check_same_names,
    check_sums,
    match_predictions,
    read_predictions,
    write_predictions,
)
from batteries.evaluation.scoring import score
from batteries.metrics.labels import best_threshold
from batteries.submission.blending import LOSS_NAMES, Method, blend, correlations, fit_weights, normalize_weights
from batteries.submission.mask_blending import blend_masks

DEFAULT_POWER = 2.0


@dataclass(frozen=True)
class Options:
    """Blend predictions of several models."""

    inputs: Positional[tuple[Path, ...]]  # two or more predictions files of tools/predict.py
    output: Path = Path("blend.csv")  # output file
    method: Method = "mean"  # rank ignores how the models are calibrated
    power: float | None = None  # exponent of --method power, over 0; over 1 favours confident models; 2 by default
    weights: str | None = None  # one weight per input, such as 2,1; equal by default
    fit_on: tuple[Path, ...] = ()  # out-of-fold predictions with targets, one per input, to find the weights on
    independent: bool = False  # a sample can belong to several classes: rows need not sum to one
    overwrite: bool = False  # replace an output that exists and differs


def main(options: Options) -> None:
    """Match, blend, write and score the predictions."""
    if len(options.inputs) < 2:
        raise UserError(f"blend.py needs two or more predictions files, not {len(options.inputs)}.")
    power = find_power(options)
    if any(map(is_mask_table, options.inputs)):
        blend_all_masks(options, power)
        return
    tables = read_tables(options.inputs, options)
    weights = find_weights(options, power, tables[0])
    values = blend_tables(stack(tables), weights, power, tables[0].kind, options)
    blended = replace(tables[0], name=str(options.output), values=values)
    blended = replace(blended, threshold=find_threshold(blended, tables, weights))
    write_predictions(options.output, blended, overwrite=options.overwrite)
    print_summary(tables, weights, blended)


def blend_tables(tables: np.ndarray, weights: np.ndarray, power: float, kind: Kind, options: Options) -> np.ndarray:
    """Blend predictions (M, N, C) of a kind with weights (M,)."""
    return blend(
        tables,
        options.method,
        weights,
        power,
        normalize_rows=kind == "class" and not options.independent,
        is_probability=kind != "numbers",
    )


def find_threshold(blended: Predictions, tables: Sequence[Predictions], weights: np.ndarray) -> float | None:
    """Return the threshold of blended labels: the best one if targets are known, else the mean of the inputs."""
    if blended.kind != "labels":
        return None
    if blended.targets is not None:
        return best_threshold(blended.targets, blended.values)
    thresholds = [table.threshold for table in tables]
    if None in thresholds:
        return None
    return float(np.dot(weights, np.array(thresholds, dtype=np.float64)))


def blend_all_masks(options: Options, power: float) -> None:
    """Blend the probabilities of masks, and write and score the result."""
    if options.fit_on:
        raise UserError("--fit-on is not available for masks; give --weights.")
    if options.method == "rank":
        raise UserError("--method rank is not available for masks; use mean, power or geometric.")
    count = len(options.inputs)
    equal = np.full(count, 1 / count)
    weights = equal if options.weights is None else parse_weights(options.weights, count)

    def blend_image(probabilities: np.ndarray) -> np.ndarray:
        return blend(probabilities, options.method, weights, power)

    tables = [read_mask_table(path) for path in options.inputs]
    blended = blend_masks(options.output, tables, blend_image, overwrite=options.overwrite)
    for number, (table, weight) in enumerate(zip(tables, weights, strict=True), start=1):
        print(f"{number:<8} {table.path}  weight {weight:.4f}{format_metrics(table.scores())}")
    print(f"wrote    {blended.path}: {len(blended.ids):,} masks{format_metrics(blended.scores())}")


def find_power(options: Options) -> float:
    """Return the power of --method power. Raises UserError if it is invalid or has no effect."""
    if options.power is None:
        return DEFAULT_POWER
    if not 0 < options.power < float("inf"):
        raise UserError(f"--power {options.power} must be over 0 and finite.")
    if options.method != "power":
        raise UserError(f"--power is for --method power, not {options.method}.")
    return options.power


def read_tables(paths: Sequence[Path], options: Options) -> list[Predictions]:
    """Read predictions files, and match them to the first one."""
    tables = [read_predictions(path) for path in paths]
    for table in tables:
        if table.kind == "numbers" and options.method != "mean":
            raise UserError(f"--method {options.method} is for probabilities, and {table.name} has numbers; use mean.")
        if table.kind == "class" and options.method != "rank" and not options.independent:
            check_sums(table)
    return match_predictions(tables)


def find_weights(options: Options, power: float, first: Predictions) -> np.ndarray:
    """Return the weights (M,), which sum to one: given, found on out-of-fold predictions, or equal.

    Args:
        options: The options.
        power: The power of --method power.
        first: The first input, whose classes the out-of-fold predictions must have.
    """
    if options.weights is not None and options.fit_on:
        raise UserError("--weights and --fit-on exclude each other; give one of them.")
    if options.fit_on:
        return fit(options, power, first)
    if options.weights is None:
        return np.full(len(options.inputs), 1 / len(options.inputs))
    return parse_weights(options.weights, len(options.inputs))


def parse_weights(text: str, count: int) -> np.ndarray:
    """Parse `count` numbers that are separated by commas; return weights (M,) that sum to one."""
    try:
        weights = np.array([float(part) for part in text.split(",")])
    except ValueError:
        raise UserError(f"--weights {text} must be numbers separated by commas, such as 2,1.") from None
    if len(weights) != count:
        raise UserError(
            f"--weights {text} has {count_of(len(weights), 'weight')} for {count_of(count, 'input')}; give one per "
            "input."
        )
    if not np.all(np.isfinite(weights) & (weights >= 0)) or not weights.any():
        raise UserError(f"--weights {text} must be 0 or more, finite, and not all 0.")
    return normalize_weights(weights)


def fit(options: Options, power: float, first: Predictions) -> np.ndarray:
    """Find weights (M,) on out-of-fold predictions, and print the loss that can be expected of them."""
    if len(options.fit_on) != len(options.inputs):
        raise UserError(
            f"--fit-on has {count_of(len(options.fit_on), 'file')} for {count_of(len(options.inputs), 'input')}; give "
            "one per input."
        )
    if options.method == "rank":
        raise UserError("--fit-on minimises the cross-entropy, which --method rank does not have; give --weights.")
    if options.independent:
        raise UserError("--fit-on minimises the cross-entropy, which --independent does not have; give --weights.")
    tables = read_tables(options.fit_on, options)
    check_same_names("class", first.name, first.classes, tables[0].name, tables[0].classes)
    targets = tables[0].targets
    if targets is None:
        raise UserError("--fit-on needs a file with a column target, because weights are fitted to known targets.")

    kind = tables[0].kind

    def blend_fitted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return blend_tables(values, weights, power, kind, options)

    fitted = fit_weights(stack(tables), targets, blend_fitted, kind)
    print(
        f"fit      {LOSS_NAMES[kind]} {fitted.loss:.4f} by cross-validation of the weights, "
        f"{fitted.equal_loss:.4f} with equal weights"
    )
    return fitted.weights


def stack(tables: Sequence[Predictions]) -> np.ndarray:
    """Stack the predictions of matched tables; shape (M, N, C)."""
    return np.stack([table.values for table in tables])


def print_summary(tables: Sequence[Predictions], weights: np.ndarray, blended: Predictions) -> None:
    """Print the inputs with weights and scores, their correlations, and the output with its scores."""
    for number, (table, weight) in enumerate(zip(tables, weights, strict=True), start=1):
        print(f"{number:<8} {table.name}  weight {weight:.4f}{format_scores(table)}")
    print("corr     Pearson's correlation of the predictions")
    for number, row in enumerate(correlations(stack(tables)), start=1):
        values = ["none  " if np.isnan(value) else f"{value:.4f}" for value in row]
        print(f"{number:<8} {'  '.join(values)}")
    print(f"wrote    {blended.name}: {len(blended.ids):,} rows{format_scores(blended)}")


def format_scores(table: Predictions) -> str:
    """Format the scores of a table; empty if its targets are not known."""
    return format_metrics(score(table))


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format metrics after two spaces each."""
    return "".join(f"  {name} {value:.4f}" for name, value in metrics.items())


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
