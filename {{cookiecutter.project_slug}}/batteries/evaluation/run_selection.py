"""What the other verbs read from a run's folder: its config, and which of its checkpoints is meant."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from batteries.checkpoint.manifest import AVERAGE, read_average, read_manifest
from batteries.core.config_io import from_json
from batteries.core.errors import UserError
from batteries.core.text import did_you_mean

Config = TypeVar("Config")


def read_config(folder: Path, config_class: type[Config]) -> Config:
    """The Config of the run in `folder`. Raises BadInput where there is none, or it has another kind of knob."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"--run {folder} holds no run: config.json is missing; give one, such as logs/baseline.")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--run {folder} has a config.json that cannot be read ({error}); put it back.") from None
    return from_json(config_class, values, str(path))


def find_checkpoint(folder: Path, stages: Sequence[str], stage: str | None, which: str, *, minimize: bool) -> Path:
    """The file of a run that is meant by `which` (best, last, swa, or a path) of `stage`, one of `stages`.

    Without `stage`: for best and swa the one with the best score, the earlier on a tie; for last the last that began.
    Raises BadInput where there is none.
    """
    if stage is not None and stage not in stages:
        raise UserError(
            f"--stage {stage} is none of {folder}{did_you_mean(stage, stages) or '.'} It has: {', '.join(stages)}."
        )
    if which not in ("best", "last", "swa"):
        return Path(which)
    name = AVERAGE if which == "swa" else f"{which}.pth"
    looked_in = [stage] if stage else stages
    there = [one for one in looked_in if (folder / one / name).is_file()]
    if not there:
        hint = "train it first"
        if which == "swa":
            hint = "run tools/average.py first"
        elif any((folder / one / "last.pth").is_file() for one in looked_in):
            hint = "use --checkpoint last"
        raise UserError(f"--checkpoint {which}: no {name} in {folder / stage if stage else folder}; {hint}.")
    if which == "last":
        return folder / there[-1] / name
    score_of = average_score if which == "swa" else best_score
    return folder / _best(there, lambda one: score_of(folder / one), minimize) / name


def best_score(folder: Path) -> float | None:
    """The best validation score of a stage, by its ledger."""
    return read_manifest(folder)["best"]["score"]


def average_score(folder: Path) -> float | None:
    """The validation score of a stage's average."""
    return read_average(folder).get("score")


def _best(names: Sequence[str], score_of: Callable[[str], float | None], minimize: bool) -> str:
    """The name with the best score, the earlier on a tie; without any score the last."""
    scores = {name: score for name in names if (score := score_of(name)) is not None}
    if not scores:
        return names[-1]
    return (min if minimize else max)(scores, key=lambda name: scores[name])
