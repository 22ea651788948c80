"""Scores of a cross-validation, for scripts/train_folds.sh.

    python -m batteries.evaluation.cross_validation logs/NAME

Reads the finished runs logs/NAME/fold_0, fold_1, … and prints the best score of each, their mean and their standard
deviation.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError

COMPLETE = ("finished", "stopped early")  # values of "exit" in run.json


def main(arguments: list[str]) -> int:
    """Print the scores of the folds in one directory, by default the current one; return the exit code."""
    try:
        directory = parse_directory(arguments)
        print(summarize(read_folds(directory)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_directory(arguments: list[str]) -> Path:
    """Return the directory of the folds. Raises UserError for more than one argument."""
    if len(arguments) > 1:
        raise UserError(f"{len(arguments)} directories are given; give one that holds fold_0, fold_1 and so on.")
    return Path(*arguments)


def read_folds(directory: Path) -> list[dict[str, Any]]:
    """Read run.json of each fold, in order.

    Raises:
        UserError: If a fold is missing or not finished, or used a different split file or main metric than fold 0.
    """
    first = read_record(directory / "fold_0")
    records = [read_record(directory / f"fold_{fold}") for fold in range(first["split"]["folds"])]
    for fold, record in enumerate(records):
        if record["split"]["sha256"] != first["split"]["sha256"]:
            raise UserError(
                f"{directory}/fold_{fold} used a different {record['split']['file']} than fold_0, so a sample may be "
                "validated twice or never; train all folds with one split file."
            )
        if record["best"]["metric"] != first["best"]["metric"]:
            raise UserError(
                f"{directory}/fold_{fold} has the main metric {record['best']['metric']}, but fold_0 has "
                f"{first['best']['metric']}; train all folds with one --main-metric."
            )
    return records


def read_record(directory: Path) -> dict[str, Any]:
    """Read run.json of a finished run. Raises UserError if it is missing or the run is not finished."""
    path = directory / "run.json"
    if not path.is_file():
        raise UserError(
            f"{directory} does not hold a run; start scripts/train_folds.sh again, or give the directory of the folds."
        )
    record = json.loads(path.read_text())
    if record["exit"] not in COMPLETE or "best" not in record:
        raise UserError(f"{directory} is not finished ({record['exit']}); start scripts/train_folds.sh again.")
    return record


def summarize(records: list[dict[str, Any]]) -> str:
    """Format one line per fold, and the mean with the sample standard deviation (n - 1) over the folds."""
    metric = records[0]["best"]["metric"]
    lines = []
    scores = []
    for fold, record in enumerate(records):
        best = record["best"]
        score = best["score"]
        if score is None:
            raise UserError(f"fold {fold} has no finite {metric}; inspect its metrics.jsonl.")
        scores.append(score)
        lines.append(f"fold {fold}   {metric} {score:.4f}  {best['stage']} epoch {best['epoch']}")
    mean = statistics.mean(scores)
    deviation = statistics.stdev(scores)
    return "\n".join([*lines, f"mean     {metric} {mean:.4f}  standard deviation {deviation:.4f}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
