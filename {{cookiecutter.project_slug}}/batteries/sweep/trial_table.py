"""What a sweep found: a table, trials.csv, and best.json for train.py."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batteries.core.files import write_text
from batteries.sweep.optional_import import import_optuna
from batteries.sweep.search_space import format_value
from batteries.sweep.study import SweepStudy

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
MAX_CAUSE = 80  # characters of the cause of a failure in a table


def trial_rows(study: SweepStudy, names: Sequence[str]) -> list[list[str]]:
    """Return a row for each trial, the best one first: number, state, score, the values of options, and a cause."""
    complete = study.complete_trials()
    others = [trial for trial in study.trials if trial.state.name != "COMPLETE"]
    rows = []
    for trial in [*complete, *others]:
        score = "" if trial.value is None or math.isnan(trial.value) else f"{trial.value:.4f}"
        values = [format_value(trial.params[name]) for name in names]
        cause = trial.user_attrs.get("cause", "")
        if len(cause) > MAX_CAUSE:
            cause = f"{cause[: MAX_CAUSE - 1]}…"
        rows.append([str(trial.number), STATES[trial.state.name], score, *values, cause])
    return rows


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def header_of(metric: str, names: Sequence[str]) -> list[str]:
    """Return the names of the columns of `trial_rows`."""
    return ["trial", "state", metric, *names, "cause"]


def write_files(directory: Path, study: SweepStudy, names: Sequence[str], metric: str, best: Mapping[str, Any]) -> None:
    """Write trials.csv and best.json, which `train.py --config` accepts.

    Args:
        directory: The directory of the sweep.
        study: The study.
        names: The names of the options that are varied.
        metric: The main metric.
        best: The options of the best trial, as JSON values; empty if none ended with a score.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header_of(metric, names))
    for trial in study.trials:
        values = [trial.params[name] for name in names]
        writer.writerow(
            [trial.number, STATES[trial.state.name], trial.value, *values, trial.user_attrs.get("cause", "")]
        )
    write_text(directory / "trials.csv", text.getvalue())
    if best:
        write_text(directory / "best.json", json.dumps(best, indent=2) + "\n")


def importances(study: SweepStudy, names: Sequence[str]) -> dict[str, float] | None:
    """Return the importance of each option (fANOVA, Hutter et al. 2014); None if there are too few trials for it."""
    scores = [trial.value for trial in study.complete_trials()]
    if len(names) < 2 or len(scores) < 4 or min(scores) == max(scores):
        return None
    importance = import_optuna().importance
    evaluator = importance.FanovaImportanceEvaluator(seed=0)
    return dict(importance.get_param_importances(study.study, evaluator=evaluator, params=list(names)))
