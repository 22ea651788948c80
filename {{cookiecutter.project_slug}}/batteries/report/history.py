"""What runs left in their folders, read without torch: knobs, record, and what each epoch came to."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from batteries.core.errors import UserError
from batteries.core.files import read_json
from batteries.core.jsonl import read_jsonl
from batteries.core.text import find_repeated


class Span(NamedTuple):
    """The epochs of a stage, counted from 1 over all stages, the last one included."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class History:
    """One run, whole or cut: of a run that was cut early the record or the epochs are empty."""

    name: str  # what it is called beside others
    folder: Path
    config: dict[str, Any]  # config.json
    record: dict[str, Any]  # run.json
    epochs: list[dict[str, Any]]  # the lines of metrics.jsonl
    timings: list[dict[str, Any]]  # the lines of timings.jsonl

    @property
    def metric(self) -> str:
        """The one that ranks epochs."""
        return self.config.get("main_metric", "accuracy")

    @property
    def parts(self) -> list[str]:
        """What each epoch was measured on: train, valid, and valid_ema where weights are averaged."""
        return list(dict.fromkeys(part for line in self.epochs for part in line if isinstance(line[part], Mapping)))

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, the one that ranks epochs first."""
        named = (name for line in self.epochs for part in self.parts for name in line.get(part, {}))
        return sorted(dict.fromkeys(named), key=lambda name: name != self.metric)

    @property
    def ranked_part(self) -> str:
        """Whose scores rank epochs: those of the averaged weights where there are any."""
        return "valid_ema" if "valid_ema" in self.parts else "valid"

    def has(self, part: str, metric: str) -> bool:
        """Whether that metric was taken on that split."""
        return any(metric in line.get(part, {}) for line in self.epochs)

    def curve(self, part: str, metric: str) -> list[float]:
        """One number for each epoch; NaN where there is none."""
        return [_number(line.get(part, {}).get(metric)) for line in self.epochs]

    def rates(self) -> list[float]:
        """The learning rate at the end of each epoch."""
        return [_number(line.get("lr")) for line in self.epochs]

    def best(self, span: Span | None = None) -> int | None:
        """The best epoch, from 1 over all stages, or that of one stage; the earlier on a tie, None without a score."""
        first, last = (1, len(self.epochs)) if span is None else span[1:]
        scores = self.curve(self.ranked_part, self.metric)[first - 1 : last]
        sign = -1 if self.config.get("minimize_metric") else 1
        finite = [(-sign * score, epoch) for epoch, score in enumerate(scores, first) if math.isfinite(score)]
        return min(finite)[1] if finite else None

    def value(self, epoch: int | None, part: str, metric: str) -> float:
        """One metric of one epoch; NaN without one."""
        return math.nan if epoch is None else self.curve(part, metric)[epoch - 1]

    def spans(self) -> list[Span]:
        """The stages that have epochs, in order."""
        stages = [line["stage"] for line in self.epochs]
        return [Span(name, stages.index(name) + 1, len(stages) - stages[::-1].index(name)) for name in unique(stages)]

    def place(self, epoch: int | None) -> str:
        """An epoch in words: `stage1 epoch 3`."""
        return "" if epoch is None else f"{self.epochs[epoch - 1]['stage']} epoch {self.epochs[epoch - 1]['epoch']}"

    def seconds(self) -> float:
        """Spent training, validation and checkpoints not counted."""
        return sum(line["seconds"] for line in self.timings)

    def samples_per_second(self) -> float:
        """In training, over all epochs; NaN where no time was kept."""
        seen = sum(line["samples_per_second"] * line["seconds"] for line in self.timings)
        return seen / self.seconds() if self.seconds() else math.nan

    def format_duration(self) -> float:
        """Seconds from the first start to the end, breaks included; NaN for a run without an end."""
        start, end = self.record.get("start"), self.record.get("end")
        if not (start and end):
            return math.nan
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()

    def outcome(self) -> str:
        """How the run ended."""
        return self.record.get("exit") or "without an end: it still runs, or was killed"

    def summary(self) -> str:
        """How the run ended, when it began, and its commit."""
        start, commit = self.record.get("start"), self.record.get("git_commit")
        said = [self.outcome()]
        said += [f"started {datetime.fromisoformat(start):%Y-%m-%d %H:%M} UTC"] if start else []
        said += [f"git {commit[:12]}{' with changes' * bool(self.record.get('git_dirty'))}"] if commit else []
        return " · ".join(said)


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant: a folder is a run, or holds runs, such as folds.

    Raises BadInput for one that is neither, and where a run is given twice.
    """
    runs = []
    for folder in folders:
        inside = [] if is_run(folder) else [path for path in sorted(folder.glob("*")) if is_run(path)]
        if not is_run(folder) and not inside:
            raise UserError(
                f"{folder} holds no run: config.json is missing; give a run's folder, such as logs/baseline."
            )
        runs += inside or [folder]
    if doubled := find_repeated(str(run.resolve()) for run in runs):
        raise UserError(f"{doubled[0]} is given twice; give each run once.")
    return runs


def is_run(folder: Path) -> bool:
    """Whether a run was started in `folder`."""
    return (folder / "config.json").is_file()


def common_folder(runs: Sequence[Path]) -> Path:
    """The folder that holds all of several runs, and is none of them."""
    found = Path(os.path.commonpath([run.resolve() for run in runs]))
    while is_run(found):
        found = found.parent
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def read_histories(runs: Sequence[Path]) -> list[History]:
    """Each run, called by its path from the folder that holds them all. Raises BadInput for a damaged file."""
    if len(runs) == 1:
        return [read_history(runs[0], runs[0].resolve().name)]
    common = common_folder(runs)
    return [read_history(run, run.resolve().relative_to(common.resolve()).as_posix()) for run in runs]


def read_history(folder: Path, name: str) -> History:
    """What is there of a run. Raises BadInput for a damaged file; a line that a kill has torn is left out."""
    config, record = (_read_object(folder / file) for file in ("config.json", "run.json"))
    epochs, timings = ([line for _, line in read_jsonl(folder / file)] for file in ("metrics.jsonl", "timings.jsonl"))
    return History(name, folder, config, record, epochs, timings)


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it is no object); put it back.")
    return values


def _number(value: Any) -> float:
    """A number of metrics.jsonl, which has null for what was not finite."""
    return float(value) if isinstance(value, int | float) else math.nan
