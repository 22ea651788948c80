"""Turn predictions into a submission with the columns, ids and order of the sample submission.

    python tools/submit.py logs/baseline/predictions/test.csv --sample data/sample_submission.csv

If the predictions do not fit the sample, the error lists every difference and nothing is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.tables import write_new_file
from batteries.data.classes import describe_indices
from batteries.evaluation.mask_table import is_mask_table, read_mask_table
from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.evaluation.scoring import DEFAULT_THRESHOLD
from batteries.submission.mask_submission import make_mask_submission
from batteries.submission.submission_file import Values, choose_values, make_submission, match_ids, read_sample

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDED = ("labels", "binary")  # the values that depend on the threshold


@dataclass(frozen=True)
class Options:
    """Turn predictions into a submission."""

    predictions: Positional[Path]  # predictions file of tools/predict.py or tools/blend.py
    sample: Path = Path("data/sample_submission.csv")  # sample submission; its first column is the id
    output: Path = Path("submission.csv")  # output file
    # label: the most probable class; index: its index from 0; labels: all classes that reach the threshold;
    # probability: of the class of each column; binary: whether that reaches the threshold, 0 or 1; number: a predicted
    # number; rle: the run-length encoding of a mask; by default label, labels, binary, number or rle, whichever fits
    values: Values | None = None
    # minimum probability of a class for labels and binary, 0 to 1; by default that of the predictions, or 0.5
    threshold: float | None = None
    at_least_one: bool = False  # labels: write the most probable label if none reaches the threshold
    column_class: str | None = None  # class of the only column, if the column is not named after it
    overwrite: bool = False  # replace an output that exists and differs


def main(options: Options) -> None:
    """Write the submission."""
    check_options(options)
    make = submit_masks if is_mask_table(options.predictions) else submit_table
    submission, notes = make(options)
    text = submission.to_csv(index=False, lineterminator="\n")
    write_new_file(options.output, text, overwrite=options.overwrite)
    for note in notes:
        print(note)
    print(f"wrote    {options.output}: {len(submission):,} rows of {', '.join(submission.columns)}")


def submit_table(options: Options) -> tuple["pd.DataFrame", list[str]]:
    """Return the submission of a table of predictions, and notes to print."""
    notes = []
    predicted = read_predictions(options.predictions)
    sample = read_sample(options.sample)
    predictions = match_ids(predicted, sample)
    if predictions is not predicted:
        notes.append(
            f"note     ids are matched without directories and suffixes: {predicted.ids[0]} is {predictions.ids[0]}"
        )
    values = choose_values(predictions, sample, options.values)
    check_threshold(options, values)
    submission = make_submission(
        predictions,
        sample,
        values,
        find_threshold(options, predictions),
        options.column_class,
        at_least_one=options.at_least_one or predictions.kind == "class",
    )
    if values == "index":
        notes.append(f"classes  {describe_indices(predictions.classes)}")
    if values in THRESHOLDED and options.threshold is None and predictions.threshold is not None:
        notes.append(f"note     the threshold is {predictions.threshold:.2f}, chosen on validation")
    return submission, notes


def submit_masks(options: Options) -> tuple["pd.DataFrame", list[str]]:
    """Return the submission of a table of masks, and no notes."""
    if options.values not in (None, "rle"):
        raise UserError(f"--values {options.values} does not fit {options.predictions}, which has masks; use rle.")
    check_threshold(options, "rle")
    masks = read_mask_table(options.predictions)
    return make_mask_submission(masks, read_sample(options.sample, repeats=True), options.column_class), []


def find_threshold(options: Options, predictions: Predictions) -> float:
    """Return the threshold of the options, else that of the predictions, else the default."""
    if options.threshold is not None:
        return options.threshold
    return DEFAULT_THRESHOLD if predictions.threshold is None else predictions.threshold


def check_threshold(options: Options, values: Values) -> None:
    """Raise UserError if --threshold or --at-least-one has no effect on these values."""
    if options.threshold is not None and values not in THRESHOLDED:
        raise UserError(f"--threshold is for --values labels and binary, not {values}.")
    if options.at_least_one and values != "labels":
        raise UserError(f"--at-least-one is for --values labels, not {values}.")


def check_options(options: Options) -> None:
    """Raise UserError for options that are invalid."""
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold} must be 0 to 1.")
    if options.output.resolve() in (options.sample.resolve(), options.predictions.resolve()):
        raise UserError(f"--output {options.output} is also an input; use another --output.")


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
