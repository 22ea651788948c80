"""Several predictions in, one better prediction out.

    python tools/blend.py logs/a/predictions/test.csv logs/b/predictions/test.csv --output logs/blend/predictions/test.csv

Rows are matched by id, columns by class, in whatever order each file has them. `--fit-on` finds weights on the
out-of-fold predictions of the same models, and says what cross-validation thinks of them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.evaluation.predictions import (
    Predictions,
    check_sums,
    compare,
    match_predictions,
    read_predictions,
    write_predictions,
)
from batteries.evaluation.scoring import score
from batteries.submission.blending import Method, blend, correlations, fit_weights, normalize_weights


@dataclass(frozen=True)
class Options:
    """Blend predictions of several models."""

    inputs: Positional[tuple[Path, ...]]  # two or more tables of predict.py
    output: Path = Path("blend.csv")  # one with other contents is not overwritten
    method: Method = "mean"  # rank where models are calibrated differently, geometric or power where they are not
    power: float | None = None  # of --method power, over 0; over 1 leans to the model that is sure; 2 by default
    weights: str | None = None  # one for each input, such as 2,1; equal by default
    fit_on: tuple[Path, ...] = ()  # out-of-fold tables with targets, one for each input, to find weights on
    independent: bool = False  # a sample may be of several classes: rows need not sum to one
    overwrite: bool = False  # replace an output that is there


def main(options: Options) -> None:
    """Check, match, blend, write and compare."""
    if len(options.inputs) < 2:
        raise UserError("blend.py needs two files of predictions or more.")
    check_power(options)
    tables = read_tables(options.inputs, options)
    weights = find_weights(options, tables[0])
    blended = Predictions(
        str(options.output), tables[0].ids, tables[0].classes, mix(tables, weights, options), tables[0].targets
    )
    write_predictions(options.output, blended, overwrite=options.overwrite)
    say(tables, weights, blended)


def check_power(options: Options) -> float:
    """The power of --method power. Raises BadInput where it is none, or would change nothing."""
    power = 2.0 if options.power is None else options.power
    if not 0 < power < float("inf"):
        raise UserError(f"--power {power} must be over 0 and finite.")
    if options.power is not None and options.method != "power":
        raise UserError(f"--power is for --method power, not {options.method}.")
    return power


def read_tables(paths: tuple[Path, ...], options: Options) -> list[Predictions]:
    """The tables in `paths`, in the order of the first."""
    tables = [read_predictions(path) for path in paths]
    for table in tables:
        if options.method != "rank" and not options.independent:
            check_sums(table)
    return match_predictions(tables)


def find_weights(options: Options, first: Predictions) -> np.ndarray:
    """The weights (M,) that were given or are found on out-of-fold predictions, else equal ones; they sum to one."""
    if options.weights is not None and options.fit_on:
        raise UserError("--weights and --fit-on exclude each other: give weights, or let them be found.")
    if options.fit_on:
        return fit(options, first)
    if options.weights is None:
        return np.full(len(options.inputs), 1 / len(options.inputs))
    try:
        weights = np.array([float(part) for part in options.weights.split(",")])
    except ValueError:
        raise UserError(f"--weights {options.weights} must be numbers with commas between them, such as 2,1.") from None
    if len(weights) != len(options.inputs):
        raise UserError(
            f"--weights {options.weights} are {len(weights)}, for {len(options.inputs)} files; give as many."
        )
    if not np.all(np.isfinite(weights) & (weights >= 0)) or not weights.any():
        raise UserError(f"--weights {options.weights} must be 0 or more, finite, and not all 0.")
    return normalize_weights(weights)


def fit(options: Options, first: Predictions) -> np.ndarray:
    """Weights found on out-of-fold predictions, of the classes of the `first` input, and what they are worth."""
    if len(options.fit_on) != len(options.inputs):
        raise UserError(f"--fit-on has {len(options.fit_on)} files, for {len(options.inputs)} inputs; give as many.")
    if options.method == "rank" or options.independent:
        what = "--method rank" if options.method == "rank" else "--independent"
        raise UserError(f"--fit-on looks for the least cross-entropy, which {what} does not have; give --weights.")
    tables = read_tables(options.fit_on, options)
    compare("class", first.name, first.classes, tables[0].name, tables[0].classes)
    if (targets := tables[0].targets) is None:
        raise UserError("--fit-on needs a column target in one of its files: weights are found on known samples.")
    power = check_power(options)
    found = fit_weights(stack(tables), targets, lambda rows, weights: blend(rows, options.method, weights, power))
    print(f"fit      loss {found.loss:.4f} by cross-validation of the weights, {found.equal_loss:.4f} with equal ones")
    return found.weights


def mix(tables: list[Predictions], weights: np.ndarray, options: Options) -> np.ndarray:
    """The blended probabilities (N, C)."""
    return blend(stack(tables), options.method, weights, check_power(options), normalise=not options.independent)


def stack(tables: list[Predictions]) -> np.ndarray:
    """Probabilities (M, N, C) of matched tables."""
    return np.stack([table.probabilities for table in tables])


def say(tables: list[Predictions], weights: np.ndarray, blended: Predictions) -> None:
    """Inputs, weights and scores, how alike the inputs are, and what came out."""
    for number, (table, weight) in enumerate(zip(tables, weights, strict=True), start=1):
        print(f"{number:<8} {table.name}  weight {weight:.4f}{scores_of(table)}")
    print("alike    Pearson's correlation of the probabilities")
    for number, row in enumerate(correlations(stack(tables)), start=1):
        print(f"{number:<8} {'  '.join('none  ' if np.isnan(value) else f'{value:.4f}' for value in row)}")
    print(f"wrote    {blended.name}: {len(blended.ids):,} rows{scores_of(blended)}")


def scores_of(table: Predictions) -> str:
    """The scores where targets are known."""
    return "".join(f"  {name} {value:.4f}" for name, value in score(table).items())


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
