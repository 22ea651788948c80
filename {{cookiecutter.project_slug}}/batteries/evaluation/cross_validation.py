"""The score over all folds, for scripts/train_folds.sh.

`python -m batteries.evaluation.cross_validation logs/NAME` reads logs/NAME/fold_0, fold_1 and so on, one
finished run each, and prints the
best score of each, their mean and their standard deviation.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from batteries.core.errors import UserError

COMPLETE = ("finished", "stopped early")  # of what run.json says how a run ended


def main(arguments: list[str]) -> int:
    """Print the scores of the folds in the folder that is named; the exit code."""
    try:
        [folder] = arguments or [""]
        records = read_folds(Path(folder))
        print(summarize(records))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_folds(folder: Path) -> list[dict[str, Any]]:
    """run.json of each fold, in order. Raises BadInput where a fold is missing, cut, or of another split file."""
    first = read_record(folder / "fold_0")
    records = [read_record(folder / f"fold_{fold}") for fold in range(first["split"]["folds"])]
    for fold, record in enumerate(records):
        if record["split"]["sha256"] != first["split"]["sha256"]:
            raise UserError(
                f"{folder}/fold_{fold} was split by another {record['split']['file']} than fold_0, so a sample may "
                f"validate in both or in none; train all folds on one."
            )
        if record["best"]["metric"] != first["best"]["metric"]:
            raise UserError(f"{folder}/fold_{fold} was ranked by {record['best']['metric']}; train it as fold_0.")
    return records


def read_record(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself. Raises BadInput where it is not there or not finished."""
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run; start scripts/train_folds.sh again.")
    record = json.loads(path.read_text())
    if record["exit"] not in COMPLETE or "best" not in record:
        raise UserError(f"{folder} is not finished ({record['exit']}); start scripts/train_folds.sh again.")
    return record


def summarize(records: list[dict[str, Any]]) -> str:
    """A line for each fold, and the mean with the standard deviation of a single fold (n - 1)."""
    metric = records[0]["best"]["metric"]
    lines, scores = [], []
    for fold, record in enumerate(records):
        best = record["best"]
        score = best["score"]
        if score is None:
            raise UserError(f"fold {fold} has no finite {metric}; look at its metrics.jsonl.")
        scores.append(score)
        lines.append(f"fold {fold}   {metric} {score:.4f}  {best['stage']} epoch {best['epoch']}")
    deviation = statistics.stdev(scores)
    return "\n".join([*lines, f"mean     {metric} {statistics.mean(scores):.4f}  deviation {deviation:.4f}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
