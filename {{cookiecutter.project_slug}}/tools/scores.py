"""Every run's validation, test and leaderboard score, side by side.

    python tools/scores.py add logs/baseline --leaderboard 0.9312 --note "first light"
    python tools/scores.py
    python tools/scores.py plot

The ledger is scores.csv, in git. A folder is one run, or several (folds, a blend) with their predictions in it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.files import read_json, write_output
from batteries.core.fonts import missing_letters_as_boxes
from batteries.core.metric_names import LOWER_IS_BETTER
from batteries.core.project import ROOT
from batteries.core.text import did_you_mean
from batteries.evaluation.predictions import read_predictions
from batteries.evaluation.scoring import score
from batteries.submission.score_log import (
    SCORES,
    Point,
    ScoreEntry,
    add_entry,
    contradictions,
    disagreements,
    read_score_log,
    update_entry,
)

SCORE_LOG = ROOT / "scores.csv"

ScoreLog = Annotated[Path, arg(aliases=("--ledger",))]  # its former name still works


@dataclass(frozen=True)
class Show:
    """Print the table, the best validation score first."""

    score_log: ScoreLog = SCORE_LOG  # the file of scores


@dataclass(frozen=True)
class Add:
    """Enter one submission of one run."""

    logdir: Positional[Path]  # a run's folder, one of runs (folds), or any with predictions/valid.csv and test.csv
    name: str | None = None  # of the submission, where a run has several; by default the folder's
    metric: str | None = None  # by default the run's main metric; of a blend that of the other lines
    leaderboard: float | None = None  # the public score
    private: float | None = None  # the score after the competition's end
    valid: float | None = None  # by default from the predictions, else the best of training
    test: float | None = None  # by default from the predictions, where targets are known
    note: str = ""  # what was tried
    update: bool = False  # fill in a line that is there, with new predictions too
    score_log: ScoreLog = SCORE_LOG  # the file of scores


@dataclass(frozen=True)
class Plot:
    """Draw validation against leaderboard, and name the runs where they disagree."""

    output: Path = Path("logs/scores.png")  # the picture: .png, .pdf or .svg
    against: Literal["public", "private", "test"] = "public"  # public and private are the leaderboard's
    metric: str | None = None  # of the submissions; by default that of most lines
    score_log: ScoreLog = SCORE_LOG  # the file of scores


COMMANDS = (
    Annotated[Show, subcommand("show", default=Show())]
    | Annotated[Add, subcommand("add")]
    | Annotated[Plot, subcommand("plot", default=Plot())]
)


def main(command: Show | Add | Plot) -> None:
    """Do what was asked for."""
    if isinstance(command, Add):
        add(command)
    elif isinstance(command, Plot):
        plot(command)
    else:
        show(read_score_log(command.score_log))
    for sentence in contradictions(read_score_log(command.score_log)):
        print(f"note     {sentence}")


def add(command: Add) -> None:
    """Enter or fill in a line: what was given wins over what the folder says."""
    folder = command.logdir
    given = {name: getattr(command, name) for name in ("valid", "test", "private")} | {"public": command.leaderboard}
    for name, value in given.items():
        if value is not None and not float("-inf") < value < float("inf"):
            raise UserError(f"--{'leaderboard' if name == 'public' else name} {value} must be a finite number.")
    address, name = _address(folder), command.name or folder.resolve().name
    found = describe(folder, command, (address, name)) if folder.is_dir() else {}
    if not found and not command.update:
        raise UserError(f"{folder} holds neither a run nor predictions; give a run's folder, such as logs/baseline.")
    values: dict[str, Any] = found | {name: value for name, value in given.items() if value is not None}
    if command.update:  # the folder may be gone by now
        old, entry = update_entry(command.score_log, (address, name), **values, note=command.note)
        for score in SCORES:
            if getattr(old, score) not in (None, getattr(entry, score)):
                print(f"changed  {score} was {_number(getattr(old, score))}")
    else:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        entry = ScoreEntry(date, name, address, **values, note=command.note)
        add_entry(command.score_log, entry)
    print(f"entered  {entry.name}: {entry.metric} {_scores(entry)}")


def describe(folder: Path, command: Add, key: tuple[str, str]) -> dict[str, Any]:
    """What a folder says of a submission: commit, config, metric, valid, test; empty where it holds nothing of one."""
    runs = [folder] if (folder / "run.json").is_file() else [path.parent for path in sorted(folder.glob("*/run.json"))]
    predicted = [split for split in ("valid", "test") if (folder / "predictions" / f"{split}.csv").is_file()]
    if not runs and not predicted:
        return {}
    records, configs = ([_read_json(run / name) for run in runs] for name in ("run.json", "config.json"))
    metric = command.metric or find_metric(configs, command, key)
    best = (records[0].get("best") if runs == [folder] else None) or {}
    scores: dict[str, Any] = {"valid": best.get("score") if best.get("metric", metric) == metric else None}
    scores |= {split: value for split in predicted if (value := _predicted(folder, split, metric)) is not None}
    commits = "+".join(sorted({str(record.get("git_commit") or "")[:12] for record in records}))
    return {"commit": commits, "config": name_recipe(records), "metric": metric, **scores}


def find_metric(configs: Sequence[dict[str, Any]], command: Add, key: tuple[str, str]) -> str:
    """The main metric of the first run; of a blend, which has none, that of its line, else of the other lines."""
    if configs:
        return configs[0].get("main_metric", "accuracy")
    entries = read_score_log(command.score_log)
    known = sorted({entry.metric for entry in entries if entry.key == key} or {entry.metric for entry in entries})
    if len(known) > 1:
        raise UserError(
            f"{command.logdir} is no run, and {command.score_log} has {', '.join(known)}: say which by --metric."
        )
    return known[0] if known else "accuracy"


def name_recipe(records: Sequence[dict[str, Any]]) -> str:
    """The config hash of one run, or one for those of all folds: a repeated run has the same. Empty without a run."""
    hashes = [record["config_hash"] for record in records if record.get("config_hash")]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12] if len(hashes) > 1 else "".join(hashes)


def show(entries: Sequence[ScoreEntry]) -> None:
    """Print the entries, each metric's best validation score first, with the gaps to it."""
    if not entries:
        print("no scores yet: python tools/scores.py add logs/baseline --leaderboard 0.9312")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "metric", *SCORES, "test-valid", "public-valid", "date", "logdir", "commit", "note"):
        table.add_column(column, justify="right" if column in SCORES or "-" in column else "left", overflow="fold")
    for entry in sorted(entries, key=_order):
        scores = [_number(getattr(entry, name)) for name in SCORES]
        gaps = [_gap(entry.valid, entry.test), _gap(entry.valid, entry.public)]
        table.add_row(
            entry.name, entry.metric, *scores, *gaps, entry.date[:10], entry.logdir, entry.commit[:7], entry.note
        )
    Console(width=max(160, Console().width), soft_wrap=True, highlight=False, markup=False).print(table)


def plot(command: Plot) -> None:
    """Draw, and say how far validation and leaderboard agree on which run is better."""
    metric, points, others = comparable(command)
    agreement = rank_correlation(points, command.against)
    draw(points, command, metric, f"Spearman's rank correlation {agreement}")
    print(f"rank     correlation of valid and {command.against}: {agreement} (Spearman, {len(points)} submissions)")
    for one, other in disagreements(points):
        print(f"disagree {one} has more {metric} than {other} in valid, and less in {command.against}")
    if others:
        print(f"left out {', '.join(others)}; --metric plots another than {metric}")
    print(f"wrote    {command.output}")


def rank_correlation(points: Sequence[Point], against: str) -> str:
    """Spearman's, in digits; in words where the scores of one side are equal."""
    from scipy.stats import spearmanr

    sides = [point.first for point in points], [point.second for point in points]
    for name, values in zip(("valid", against), sides, strict=True):
        if len(set(values)) == 1:
            return f"none, as all {name} scores are equal"
    return f"{spearmanr(*sides)[0]:.3f}"


def comparable(command: Plot) -> tuple[str, list[Point], list[str]]:
    """The metric, the entries that have both scores of it, and how many have those of other metrics, in words.

    Raises BadInput where two are not there.
    """
    found: dict[str, list[Point]] = {}
    for entry in read_score_log(command.score_log):
        ours, theirs = entry.valid, getattr(entry, command.against)
        if ours is not None and theirs is not None:
            found.setdefault(entry.metric, []).append(Point(entry.name, ours, theirs))
    metric = command.metric or max(found, key=lambda name: len(found[name]), default="")
    counts = {name: f"{len(points)} of {name}" for name, points in found.items()}
    if len(found.get(metric, [])) < 2:
        raise UserError(
            f"scores.py plot needs two submissions or more that have valid and {command.against} of one metric; "
            f"{command.score_log} has {', '.join(counts.values()) or 'none'}."
        )
    return metric, found[metric], [text for name, text in counts.items() if name != metric]


def draw(points: Sequence[Point], command: Plot, metric: str, title: str) -> None:
    """One named dot per submission, and the line on which both scores are equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for name, ours, theirs in points:
        axes.plot(ours, theirs, "o", color="tab:blue")
        axes.annotate(name, (ours, theirs), xytext=(5, 5), textcoords="offset points", parse_math=False)
    axes.axline((points[0].first, points[0].first), slope=1, color="lightgrey", zorder=0)
    axes.set(xlabel=f"valid {metric}", ylabel=f"{command.against} {metric}", title=title)
    kind = command.output.suffix.removeprefix(".")
    if kind not in ("png", "pdf", "svg"):
        raise UserError(f"--output {command.output} must end in .png, .pdf or .svg.")
    with missing_letters_as_boxes():
        write_output(command.output, lambda file: figure.savefig(file, format=kind), "--output")


def _predicted(folder: Path, split: str, metric: str) -> float | None:
    """The score of the predictions in `folder`, where they have targets."""
    table = read_predictions(folder / "predictions" / f"{split}.csv")
    if metric in ("accuracy", "loss"):
        return score(table).get(metric)
    from train import SCORES

    if metric not in SCORES:
        known = ("accuracy", "loss", *SCORES)
        raise UserError(
            f"--metric {metric} is no metric{did_you_mean(metric, known) or '.'} Use one of: {', '.join(known)}."
        )
    value = score(table, {metric: SCORES[metric]})[metric]
    if math.isnan(value):
        print(f"note     {metric} has no meaning for {table.name}: {split} stays empty, or give --{split}")
        return None
    return value


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it is no object); put it back.")
    return values


def _address(folder: Path) -> str:
    """The folder as seen from this repository, where it lies in it: the same on another machine."""
    here, root = folder.resolve(), ROOT.resolve()
    return here.relative_to(root).as_posix() if here.is_relative_to(root) else here.as_posix()


def _order(entry: ScoreEntry) -> tuple[str, bool, float, str]:
    """Best first, in each metric's own direction; without a score last."""
    sign = 1 if entry.metric in LOWER_IS_BETTER else -1
    return entry.metric, entry.valid is None, sign * (entry.valid or 0), entry.date


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _gap(first: float | None, second: float | None) -> str:
    return "" if first is None or second is None else f"{second - first:+.4f}"


def _scores(entry: ScoreEntry) -> str:
    return "  ".join(f"{name} {_number(value)}" for name in SCORES if (value := getattr(entry, name)) is not None)


if __name__ == "__main__":
    run_command(main, COMMANDS, repeats=False, default=Show())
