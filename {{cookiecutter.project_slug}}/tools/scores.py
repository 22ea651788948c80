"""Compare the validation, test and leaderboard scores of all submissions.

    python tools/scores.py add logs/baseline --leaderboard 0.9312 --note "first submission"
    python tools/scores.py
    python tools/scores.py plot

The score log is scores.csv, which belongs in git. `add` takes a run directory, or a directory of several runs (folds, a
blend) that holds their predictions.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.files import read_json, write_output
from batteries.core.fonts import ignore_missing_glyphs
from batteries.core.metric_names import is_lower_better, select_scores
from batteries.core.project import ROOT
from batteries.core.text import count_of, did_you_mean
from batteries.evaluation.mask_table import is_mask_table, read_mask_table
from batteries.evaluation.predictions import read_predictions
from batteries.evaluation.scoring import MEANS, score
from batteries.submission.score_log import (
    SCORE_COLUMNS,
    ScoreEntry,
    ScorePair,
    add_entry,
    find_conflicts,
    find_rank_disagreements,
    read_score_log,
    update_entry,
)

SCORE_LOG = ROOT / "scores.csv"
IMAGE_FORMATS = ("png", "pdf", "svg")

ScoreLog = Annotated[Path, arg(aliases=("--ledger",))]  # the former name still works (glossary: allow)


@dataclass(frozen=True)
class Show:
    """Print the score log, the best validation score first."""

    score_log: ScoreLog = SCORE_LOG  # path of the score log


@dataclass(frozen=True)
class Add:
    """Add a submission of a run to the score log."""

    logdir: Positional[Path]  # a run directory, or a directory of runs (folds) or of predictions/valid.csv and test.csv
    name: str | None = None  # name of the submission, if a run has several; by default that of the directory
    metric: str | None = None  # by default the run's main metric; for a blend, the metric of the other lines
    leaderboard: float | None = None  # score on the public leaderboard
    private: float | None = None  # score on the private leaderboard, after the competition
    valid: float | None = None  # by default computed from the predictions, or else the best score of training
    test: float | None = None  # by default computed from the predictions, if targets are known
    note: str = ""  # free text, such as what was tried
    update: bool = False  # change the line of the submission, also from new predictions
    score_log: ScoreLog = SCORE_LOG  # path of the score log


@dataclass(frozen=True)
class Plot:
    """Plot validation against leaderboard scores, and list the pairs of submissions that they rank differently."""

    output: Path = Path("logs/scores.png")  # image file: .png, .pdf or .svg
    against: Literal["public", "private", "test"] = "public"  # public and private are leaderboard scores
    metric: str | None = None  # metric of the submissions; by default the most frequent one
    score_log: ScoreLog = SCORE_LOG  # path of the score log


COMMANDS = (
    Annotated[Show, subcommand("show", default=Show())]
    | Annotated[Add, subcommand("add")]
    | Annotated[Plot, subcommand("plot", default=Plot())]
)


def main(command: Show | Add | Plot) -> None:
    """Run a subcommand, and print the conflicts in the score log."""
    if isinstance(command, Add):
        add(command)
    elif isinstance(command, Plot):
        plot(command)
    else:
        show(read_score_log(command.score_log))
    for conflict in find_conflicts(read_score_log(command.score_log)):
        print(f"note     {conflict}")


def add(command: Add) -> None:
    """Add or update a line; options take precedence over what the directory contains."""
    check_scores(command)
    directory = command.logdir
    key = (portable_path(directory), command.name or directory.resolve().name)
    found = describe_submission(directory, command, key) if directory.is_dir() else {}
    if not found and not command.update:
        raise UserError(f"{directory} has neither a run nor predictions; give a run directory, such as logs/baseline.")
    values: dict[str, Any] = found | given_scores(command)
    if command.update:  # the directory may have been deleted
        before, entry = update_entry(command.score_log, key, **values, note=command.note)
        print_changes(before, entry)
    else:
        if not any(values.get(column) is not None for column in SCORE_COLUMNS):
            raise UserError(
                f"{directory} has no scores; write its predictions with tools/predict.py, or give --leaderboard."
            )
        logdir, name = key
        date = datetime.now(UTC).isoformat(timespec="seconds")
        entry = ScoreEntry(date, name, logdir, **values, note=command.note)
        add_entry(command.score_log, entry)
    print(f"{'updated' if command.update else 'added':<8} {entry.name}: {entry.metric} {format_scores(entry)}")


def check_scores(command: Add) -> None:
    """Raise UserError for scores that are not finite."""
    scores = {
        "--valid": command.valid,
        "--test": command.test,
        "--private": command.private,
        "--leaderboard": command.leaderboard,
    }
    for flag, value in scores.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{flag} {value} must be a finite number.")


def given_scores(command: Add) -> dict[str, float]:
    """Return the scores that are given as options, by their column."""
    scores = {
        "valid": command.valid,
        "test": command.test,
        "private": command.private,
        "public": command.leaderboard,
    }
    return {column: value for column, value in scores.items() if value is not None}


def print_changes(before: ScoreEntry, after: ScoreEntry) -> None:
    """Print the former value of each score that an update replaced."""
    for column in SCORE_COLUMNS:
        old = getattr(before, column)
        if old is not None and old != getattr(after, column):
            print(f"changed  {column} was {format_number(old)}")


def describe_submission(directory: Path, command: Add, key: tuple[str, str]) -> dict[str, Any]:
    """Read the commit, config, metric and scores of a submission.

    Args:
        directory: A run directory, a directory of runs, or a directory with predictions.
        command: The options.
        key: The logdir and name of the submission.

    Returns:
        Columns of the score log; empty if the directory has neither a run nor predictions.
    """
    is_run = (directory / "run.json").is_file()
    runs = [directory] if is_run else [path.parent for path in sorted(directory.glob("*/run.json"))]
    predicted = [split for split in ("valid", "test") if (directory / "predictions" / f"{split}.csv").is_file()]
    if not runs and not predicted:
        return {}
    records = [read_object(run / "run.json") for run in runs]
    configs = [read_object(run / "config.json") for run in runs]
    metric = command.metric or find_metric(configs, command, key)
    reported = [name for config in configs for name in ("loss", config.get("main_metric"))]
    scores: dict[str, float | None] = {"valid": best_of_training(records[0], metric) if is_run else None}
    for split in predicted:
        value = score_predictions(directory, split, metric, reported)
        if value is not None:
            scores[split] = value
    commits = "+".join(sorted({str(record.get("git_commit") or "")[:12] for record in records}))
    return {"commit": commits, "config": hash_configs(records), "metric": metric, **scores}


def best_of_training(record: dict[str, Any], metric: str) -> float | None:
    """Return the best score in run.json; None if it is of another metric."""
    best = record.get("best") or {}
    return best.get("score") if best.get("metric", metric) == metric else None


def find_metric(configs: Sequence[dict[str, Any]], command: Add, key: tuple[str, str]) -> str:
    """Return the main metric of the first run. For a blend, which has no run, return that of the score log.

    Raises:
        UserError: If the score log has several metrics, and none for this submission.
    """
    if configs:
        return configs[0].get("main_metric", "accuracy")
    entries = read_score_log(command.score_log)
    own = {entry.metric for entry in entries if entry.key == key}
    known = sorted(own or {entry.metric for entry in entries})
    if len(known) > 1:
        raise UserError(
            f"{command.logdir} is not a run and {command.score_log} has the metrics {', '.join(known)}; choose one "
            "with --metric."
        )
    return known[0] if known else "accuracy"


def hash_configs(records: Sequence[dict[str, Any]]) -> str:
    """Return the config hash of one run, or a hash of those of all folds; empty without a run.

    A run that is repeated with equal options has the same hash.
    """
    hashes = [record["config_hash"] for record in records if record.get("config_hash")]
    if len(hashes) <= 1:
        return "".join(hashes)
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]


def show(entries: Sequence[ScoreEntry]) -> None:
    """Print the entries by metric, the best validation score first, with the differences to it."""
    if not entries:
        print("no scores yet: python tools/scores.py add logs/baseline --leaderboard 0.9312")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "metric", *SCORE_COLUMNS, "test-valid", "public-valid", "date", "logdir", "commit", "note"):
        is_number = column in SCORE_COLUMNS or "-" in column
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for entry in sorted(entries, key=sort_key):
        table.add_row(
            entry.name,
            entry.metric,
            *(format_number(getattr(entry, column)) for column in SCORE_COLUMNS),
            format_difference(entry.valid, entry.test),
            format_difference(entry.valid, entry.public),
            entry.date[:10],
            entry.logdir,
            entry.commit[:7],
            entry.note,
        )
    Console(width=max(160, Console().width), soft_wrap=True, highlight=False, markup=False).print(table)


def plot(command: Plot) -> None:
    """Draw the plot, and print how well validation and leaderboard agree on the ranking."""
    by_metric = pairs_by_metric(command)
    metric = choose_metric(by_metric, command)
    pairs = by_metric[metric]
    correlation = rank_correlation(pairs, command.against)
    draw(pairs, command, metric, f"Spearman's rank correlation {correlation}")
    submissions = count_of(len(pairs), "submission")
    print(f"rank     correlation of valid and {command.against}: {correlation} (Spearman, {submissions})")
    for first, second in find_rank_disagreements(pairs):
        print(f"disagree {first} has higher {metric} than {second} on valid, but lower on {command.against}")
    others = [name for name in by_metric if name != metric]
    if others:
        print(f"omitted  {describe_counts(by_metric, others)}; choose another metric than {metric} with --metric")
    print(f"wrote    {command.output}")


def pairs_by_metric(command: Plot) -> dict[str, list[ScorePair]]:
    """Return the submissions that have both scores, by metric."""
    by_metric: dict[str, list[ScorePair]] = {}
    for entry in read_score_log(command.score_log):
        reference = getattr(entry, command.against)
        if entry.valid is not None and reference is not None:
            by_metric.setdefault(entry.metric, []).append(ScorePair(entry.name, entry.valid, reference))
    return by_metric


def choose_metric(by_metric: dict[str, list[ScorePair]], command: Plot) -> str:
    """Return the metric to plot. Raises UserError if it has fewer than two submissions."""
    metric = command.metric or max(by_metric, key=lambda name: len(by_metric[name]), default="")
    if len(by_metric.get(metric, [])) < 2:
        counts = describe_counts(by_metric, list(by_metric)) or "none"
        raise UserError(
            f"scores.py plot needs two or more submissions with valid and {command.against} scores of one metric; "
            f"{command.score_log} has {counts}."
        )
    return metric


def describe_counts(by_metric: dict[str, list[ScorePair]], metrics: Sequence[str]) -> str:
    """List the number of submissions per metric, such as `2 of loss, 1 of accuracy`."""
    return ", ".join(f"{len(by_metric[metric])} of {metric}" for metric in metrics)


def rank_correlation(pairs: Sequence[ScorePair], against: str) -> str:
    """Format Spearman's rank correlation, or explain why it is undefined."""
    from scipy.stats import spearmanr

    valid = [pair.valid for pair in pairs]
    reference = [pair.reference for pair in pairs]
    for name, values in (("valid", valid), (against, reference)):
        if len(set(values)) == 1:
            return f"undefined, because all {name} scores are equal"
    return f"{spearmanr(valid, reference)[0]:.3f}"


def draw(pairs: Sequence[ScorePair], command: Plot, metric: str, title: str) -> None:
    """Draw one labelled point per submission, and the line on which both scores are equal."""
    from matplotlib.figure import Figure

    image_format = command.output.suffix.removeprefix(".")
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"--output {command.output} must end in .png, .pdf or .svg.")
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for name, valid, reference in pairs:
        axes.plot(valid, reference, "o", color="tab:blue")
        axes.annotate(name, (valid, reference), xytext=(5, 5), textcoords="offset points", parse_math=False)
    start = pairs[0].valid
    axes.axline((start, start), slope=1, color="lightgrey", zorder=0)
    axes.set(xlabel=f"valid {metric}", ylabel=f"{command.against} {metric}", title=title)
    with ignore_missing_glyphs():
        write_output(command.output, lambda file: figure.savefig(file, format=image_format), "--output")


def score_predictions(directory: Path, split: str, metric: str, reported: Collection[str | None]) -> float | None:
    """Score the predictions of a split.

    Args:
        directory: The directory of predictions/.
        split: valid or test.
        metric: The metric.
        reported: The metrics that valid_fn reports. One of them, such as the loss, need not be a score of predictions.

    Returns:
        The score; None if the targets are not known, or if the score is undefined or not one of predictions.
    """
    path = directory / "predictions" / f"{split}.csv"
    if is_mask_table(path):
        return score_masks(path, split, metric, reported)
    table = read_predictions(path)
    if metric in MEANS[table.kind]:
        return score(table).get(metric)
    from experiment.task import SCORES

    functions = select_scores(SCORES, [metric])
    if not functions and metric in reported:
        print(f"note     {metric} is known of training only, not of {table.name}; --{split} sets it")
        return None
    scores = score(table, functions)
    if not functions or (scores and metric not in scores):
        raise unknown_metric(metric, (*MEANS[table.kind], *SCORES, *scores))
    value = scores.get(metric, math.nan)
    if math.isnan(value):
        print(f"note     {metric} is undefined for {table.name}: {split} stays empty; --{split} sets it")
        return None
    return value


def score_masks(path: Path, split: str, metric: str, reported: Collection[str | None]) -> float | None:
    """Score the masks of a split; None as in `score_predictions`."""
    scores = read_mask_table(path).scores()
    if scores and metric not in scores and metric not in reported:
        raise unknown_metric(metric, scores)
    if metric not in scores:
        print(f"note     {metric} of {split} is not known from {path}; --{split} sets it")
    return scores.get(metric)


def unknown_metric(metric: str, known: Iterable[str]) -> UserError:
    """Return the error for a metric that does not exist."""
    known = list(dict.fromkeys(known))
    hint = did_you_mean(metric, known) or "."
    return UserError(f"--metric {metric} is not a known metric{hint} Use one of: {', '.join(known)}.")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist. Raises UserError if it is damaged."""
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (not a JSON object); restore it.")
    return values


def portable_path(directory: Path) -> str:
    """Return the path of a directory relative to the project, equal on all machines; absolute if it is elsewhere."""
    path = directory.resolve()
    root = ROOT.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def sort_key(entry: ScoreEntry) -> tuple[str, bool, float, str]:
    """Sort by metric, the best validation score first, entries without one last."""
    sign = 1 if is_lower_better(entry.metric) else -1
    return entry.metric, entry.valid is None, sign * (entry.valid or 0), entry.date


def format_number(value: float | None) -> str:
    """Format a score with four decimals; empty for None."""
    return "" if value is None else f"{value:.4f}"


def format_difference(first: float | None, second: float | None) -> str:
    """Format `second` minus `first` with its sign; empty if one of them is not known."""
    return "" if first is None or second is None else f"{second - first:+.4f}"


def format_scores(entry: ScoreEntry) -> str:
    """Format the scores that are known, such as `valid 0.9812  public 0.9312`."""
    scores = {column: getattr(entry, column) for column in SCORE_COLUMNS}
    return "  ".join(f"{column} {format_number(value)}" for column, value in scores.items() if value is not None)


if __name__ == "__main__":
    run_command(main, COMMANDS, repeats=False, default=Show())
