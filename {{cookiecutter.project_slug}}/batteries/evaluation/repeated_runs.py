"""Repeated runs of a recipe, with several seeds and folds, and their pairs with those of another recipe."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.core.files import read_json
from batteries.core.text import list_first
from batteries.evaluation.cross_validation import COMPLETE


class RepeatKey(NamedTuple):
    """The seed and the fold of a run, by which runs of two recipes are paired."""

    seed: int
    fold: int

    def __str__(self) -> str:
        return f"seed {self.seed} fold {self.fold}"


@dataclass(frozen=True)
class Recipe:
    """The finished runs of one recipe.

    Attributes:
        name: Its name in messages.
        metric: The main metric.
        minimize: Whether a lower value is better.
        scores: The best score of each run.
        directories: The run directories.
        split: The sha256 of the split file.
        folds: The number of folds of the split file.
    """

    name: str
    metric: str
    minimize: bool
    scores: Mapping[RepeatKey, float]
    directories: Mapping[RepeatKey, Path]
    split: str
    folds: int


def read_recipe(name: str, directories: Sequence[Path]) -> Recipe:
    """Read the runs of one recipe.

    Raises:
        UserError: If a run is not finished or has no finite score, if two have one seed and fold, or if they do not
            belong together.
    """
    records = {directory: _read_run(directory) for directory in directories}
    scores: dict[RepeatKey, float] = {}
    found: dict[RepeatKey, Path] = {}
    for directory, (config, record) in records.items():
        key = RepeatKey(config["seed"], config["fold"])
        if key in found:
            raise UserError(f"{found[key]} and {directory} both have {key}; give the directories of one recipe.")
        score = record["best"]["score"]
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"{directory} has no finite {record['best']['metric']}; leave it out.")
        scores[key], found[key] = score, directory
    metric = _common(records, "main metric", lambda config, record: record["best"]["metric"])
    minimize = _common(records, "--minimize-metric", lambda config, record: config["minimize_metric"])
    split = _common(records, "split file", lambda config, record: record["split"]["sha256"])
    folds = next(iter(records.values()))[1]["split"]["folds"]
    order = sorted(scores)
    return Recipe(
        name, metric, minimize, {key: scores[key] for key in order}, {key: found[key] for key in order}, split, folds
    )


def _read_run(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and run.json of a finished run."""
    config, record = (
        read_json(directory / name) if (directory / name).is_file() else {} for name in ("config.json", "run.json")
    )
    if record.get("exit") not in COMPLETE or "best" not in record:
        reason = record.get("exit") or "it has no run.json with an exit"
        raise UserError(f"{directory} is not finished ({reason}); continue it with --resume, or leave it out.")
    return config, record


def _common(records: Mapping[Path, tuple[dict, dict]], what: str, value_of: Any) -> Any:
    """Return the value that all runs have."""
    first, *others = records
    expected = value_of(*records[first])
    for directory in others:
        if (value := value_of(*records[directory])) != expected:
            raise UserError(f"{directory} has the {what} {value}, but {first} has {expected}; compare them separately.")
    return expected


def pair_runs(first: Recipe, second: Recipe) -> tuple[list[RepeatKey], np.ndarray]:
    """Pair the runs of two recipes by seed and fold.

    Returns:
        The keys of the pairs (n), and the differences of their scores, shape (n,).

    Raises:
        UserError: If the recipes have other metrics or splits, or no pair.
    """
    for what, a, b in (
        ("main metric", first.metric, second.metric),
        ("--minimize-metric", first.minimize, second.minimize),
        ("split file with sha256", f"{first.split[:12]}…", f"{second.split[:12]}…"),
    ):
        if a != b:
            raise UserError(f"{second.name} has the {what} {b}, but {first.name} has {a}; they cannot be compared.")
    keys = [key for key in first.scores if key in second.scores]
    if not keys:
        raise UserError(
            f"{first.name} ({list_first(first.scores, 3)}) and {second.name} ({list_first(second.scores, 3)}) have no "
            "seed and fold in common; train both recipes with the same seeds and folds."
        )
    return keys, np.array([second.scores[key] - first.scores[key] for key in keys])


def overlap_of(recipe: Recipe, keys: Iterable[RepeatKey]) -> float:
    """Return the ratio of validation and train split if runs are of several folds, whose train splits overlap."""
    return 1 / (recipe.folds - 1) if len({key.fold for key in keys}) > 1 else 0.0
