"""Predictions and a sample in, a checked submission out: the sample's columns, its ids, its order.

    python tools/submit.py logs/baseline/predictions/test.csv --sample data/sample_submission.csv

Every difference from the sample is named before anything is written.
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.tables import write_new_file
from batteries.evaluation.predictions import read_predictions
from batteries.submission.submission_file import Values, make_submission, read_sample


@dataclass(frozen=True)
class Options:
    """Turn predictions into a submission."""

    predictions: Positional[Path]  # a table of predict.py or blend.py
    sample: Path = Path("data/sample_submission.csv")  # the competition's own; its first column is the id
    output: Path = Path("submission.csv")  # one with other contents is not overwritten
    # label: the most probable class, index: its number from 0, labels: all classes over the threshold;
    # probability: of each column's class, binary: whether that is over the threshold
    values: Values = "label"
    threshold: float | None = None  # from this probability on a class counts, for labels and binary; 0.5 by default
    column_class: str | None = None  # whose probability the only column takes, where it is not named so
    overwrite: bool = False  # replace an output that is there


def main(options: Options) -> None:
    """Write the submission and say what is in it."""
    threshold = 0.5 if options.threshold is None else options.threshold
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold} must be 0 to 1.")
    if options.threshold is not None and options.values not in ("labels", "binary"):
        raise UserError(f"--threshold is for --values labels and binary, not {options.values}.")
    if options.output.resolve() in (options.sample.resolve(), options.predictions.resolve()):
        raise UserError(f"--output {options.output} is what the submission is made from; give another.")
    predictions = read_predictions(options.predictions)
    sample = read_sample(options.sample)
    submission = make_submission(predictions, sample, options.values, threshold, options.column_class)
    text = submission.to_csv(index=False, lineterminator="\n")
    write_new_file(options.output, text, overwrite=options.overwrite)
    print(f"wrote    {options.output}: {len(submission):,} rows of {', '.join(submission.columns)}")


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
