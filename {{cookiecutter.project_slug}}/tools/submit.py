"""Turn predictions into a submission with the columns, ids and order of the sample submission.

    python tools/submit.py logs/baseline/predictions/test.csv --sample data/sample_submission.csv

If the predictions do not fit the sample, the error lists every difference and nothing is written.
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.tables import write_new_file
from batteries.data.classes import describe_indices
from batteries.evaluation.predictions import read_predictions
from batteries.submission.submission_file import Values, make_submission, match_ids, read_sample

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Options:
    """Turn predictions into a submission."""

    predictions: Positional[Path]  # predictions file of tools/predict.py or tools/blend.py
    sample: Path = Path("data/sample_submission.csv")  # sample submission; its first column is the id
    output: Path = Path("submission.csv")  # output file
    # label: the most probable class; index: its index from 0; labels: all classes that reach the threshold;
    # probability: of the class of each column; binary: whether that reaches the threshold, 0 or 1
    values: Values = "label"
    threshold: float | None = None  # minimum probability of a class for labels and binary, 0 to 1; 0.5 by default
    column_class: str | None = None  # class of the only column, if the column is not named after it
    overwrite: bool = False  # replace an output that exists and differs


def main(options: Options) -> None:
    """Write the submission."""
    check_options(options)
    predicted = read_predictions(options.predictions)
    sample = read_sample(options.sample)
    predictions = match_ids(predicted, sample)
    if predictions is not predicted:
        print(f"note     ids are matched without directories and suffixes: {predicted.ids[0]} is {predictions.ids[0]}")
    threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    submission = make_submission(predictions, sample, options.values, threshold, options.column_class)
    text = submission.to_csv(index=False, lineterminator="\n")
    write_new_file(options.output, text, overwrite=options.overwrite)
    if options.values == "index":
        print(f"classes  {describe_indices(predictions.classes)}")
    print(f"wrote    {options.output}: {len(submission):,} rows of {', '.join(submission.columns)}")


def check_options(options: Options) -> None:
    """Raise UserError for options that are invalid or have no effect."""
    if options.threshold is not None:
        if not 0 <= options.threshold <= 1:
            raise UserError(f"--threshold {options.threshold} must be 0 to 1.")
        if options.values not in ("labels", "binary"):
            raise UserError(f"--threshold is for --values labels and binary, not {options.values}.")
    if options.output.resolve() in (options.sample.resolve(), options.predictions.resolve()):
        raise UserError(f"--output {options.output} is also an input; use another --output.")


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
