"""Selection of a run's config and checkpoint for the tools."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from batteries.checkpoint.manifest import AVERAGE, read_average, read_manifest
from batteries.core.config_io import from_json, update_saved
from batteries.core.errors import UserError
from batteries.core.files import describe_missing_run
from batteries.core.text import did_you_mean

Config = TypeVar("Config")


def read_config(directory: Path, config_class: type[Config]) -> Config:
    """Read the Config of a run; an option that this version of Config does not have is left out.

    Raises:
        UserError: If the directory does not hold a run, or an option in config.json is invalid.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"--run {describe_missing_run(directory)}")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it.") from None
    if isinstance(values, dict):
        values = update_saved(config_class, values)
    return from_json(config_class, values, str(path))


def find_checkpoint(directory: Path, stages: Sequence[str], stage: str | None, which: str, *, minimize: bool) -> Path:
    """Return the path of a checkpoint of a run.

    Args:
        directory: The run directory.
        stages: The names of all stages.
        stage: The stage. By default the stage with the best score, the earlier one on a tie; for "last" the last stage
            that has a checkpoint.
        which: "best", "last", "swa", or a path, which is returned as it is.
        minimize: Whether the main metric is better when it is lower.

    Raises:
        UserError: If the stage does not exist or has no such checkpoint.
    """
    if stage is not None and stage not in stages:
        hint = did_you_mean(stage, stages) or "."
        raise UserError(f"--stage {stage} is not a stage of {directory}{hint} Its stages: {', '.join(stages)}.")
    if which not in ("best", "last", "swa"):
        return Path(which)
    name = AVERAGE if which == "swa" else f"{which}.pth"
    candidates = list(stages) if stage is None else [stage]
    present = [candidate for candidate in candidates if (directory / candidate / name).is_file()]
    if not present:
        searched = directory if stage is None else directory / stage
        hint = _hint_for_missing(directory, candidates, which)
        raise UserError(f"{searched} has no {name}; {hint}.")
    if which == "last":
        return directory / present[-1] / name
    score_of = average_score if which == "swa" else best_score
    return directory / _best(present, lambda candidate: score_of(directory / candidate), minimize) / name


def _hint_for_missing(directory: Path, stages: Sequence[str], which: str) -> str:
    if which == "swa":
        return "run tools/average.py first"
    if any((directory / stage / "last.pth").is_file() for stage in stages):
        return "no complete epoch has a finite score; use --checkpoint last"
    return "it has no checkpoint yet; continue it with --resume"


def best_score(stage_directory: Path) -> float | None:
    """Return the best validation score of a stage, from its manifest."""
    return read_manifest(stage_directory).best.score


def average_score(stage_directory: Path) -> float | None:
    """Return the validation score of a stage's averaged checkpoint."""
    return read_average(stage_directory).get("score")


def _best(names: Sequence[str], score_of: Callable[[str], float | None], minimize: bool) -> str:
    """Return the name with the best score, the earlier one on a tie; the last name if none has a score."""
    scores: dict[str, float] = {}
    for name in names:
        score = score_of(name)
        if score is not None:
            scores[name] = score
    if not scores:
        return names[-1]
    choose = min if minimize else max
    return choose(scores, key=lambda name: scores[name])
