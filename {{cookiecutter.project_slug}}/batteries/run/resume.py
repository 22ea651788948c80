"""Find where a run continues: after its newest valid checkpoint.

Random streams follow from (seed, stage, epoch, position), so no generator state is saved: a position is enough.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from batteries.checkpoint.io import check_architecture, read_checkpoint
from batteries.checkpoint.manifest import ManifestEntry, read_manifest
from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.run.directory import RunDirectory, check_logdir, holds_run
from batteries.run.metadata import describe_code_changes, describe_environment_changes
from batteries.run.position import TrainingPosition, has_metrics_before

INITIAL_WEIGHT_OPTIONS = ("init_from", "pretrained")  # how a run began; a resumed run needs neither


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same when a run is resumed.

    Attributes:
        config: The options, as JSON values.
        may_change: The names of the options that do not affect the results.
        data: The fingerprint of the training data and their split.
        split: The output of `SplitFile.describe`.
        code: The sha256 of train.py and of each file in experiment/; a change is only reported.
    """

    config: Mapping[str, Any]
    may_change: Sequence[str]
    data: str
    split: Mapping[str, Any]
    code: Mapping[str, str]


@dataclass
class ResumePoint:
    """The newest valid checkpoint of a run.

    Attributes:
        checkpoint: Its contents; None for a new run, or one that has no checkpoint yet.
        name: Its path.
        messages: What the user should know: damaged files, steps that are repeated, changes.
    """

    checkpoint: dict[str, Any] | None = None
    name: str = ""
    messages: list[str] = field(default_factory=list)

    @property
    def position(self) -> TrainingPosition:
        """The first step that is not in the checkpoint."""
        if self.checkpoint is None:
            return TrainingPosition()
        return TrainingPosition(*self.checkpoint["resume"]["cursor"])

    @property
    def unwritten(self) -> list[list[str]]:
        """[file, line] for the lines of .jsonl files that found no space on the disk."""
        return [] if self.checkpoint is None else self.checkpoint["resume"]["unwritten"]


def find_resume_point(directory: RunDirectory, identity: RunIdentity, model: nn.Module, *, resume: bool) -> ResumePoint:
    """Find where a run continues. Nothing is written, except that damaged checkpoints are renamed.

    Args:
        directory: The run directory; it is locked if it holds a run that is resumed.
        identity: What must be the same as before.
        model: The model, whose architecture must fit.
        resume: Whether `--resume` was given.

    Raises:
        UserError: If the directory holds a run that is not to be resumed, or a different one.
    """
    if not resume or not holds_run(directory.path):
        check_logdir(directory.path)
        return ResumePoint()
    directory.lock.acquire()
    _check_split(directory, identity)
    stages = directory.read_object("config.json").get("stages", identity.config["stages"])
    names = [stage["name"] for stage in stages]
    point = find_newest_checkpoint(directory.path, names)
    if point.checkpoint is not None:
        _check_checkpoint(point, point.checkpoint, directory, identity, model, names)
    return point


def _check_checkpoint(
    point: ResumePoint,
    checkpoint: Mapping[str, Any],
    directory: RunDirectory,
    identity: RunIdentity,
    model: nn.Module,
    stages: Sequence[str],
) -> None:
    """Raise UserError if the checkpoint is not one of this run; collect what changes only the rounding."""
    saved = checkpoint["resume"]
    check_same_run(checkpoint["experiment_args"], identity.config, identity.may_change, point.position)
    if saved["data"] != identity.data:
        raise UserError(
            f"--resume would change the run: the data or their split differ from those of {point.name}. Restore them, "
            "or use another --logdir."
        )
    check_architecture(point.name, checkpoint["model_state_dict"], model)
    path = directory.path / "metrics.jsonl"
    epoch = checkpoint["stage"], checkpoint["epoch"]
    if not has_metrics_before(path, stages, epoch, point.position, saved["unwritten"]):
        raise UserError(
            f"{path} lacks the epoch before that of {point.name}; restore the file, or use another --logdir."
        )
    point.messages += describe_environment_changes(saved)
    point.messages += describe_code_changes(saved["code"], identity.code)


def _check_split(directory: RunDirectory, identity: RunIdentity) -> None:
    """Raise UserError if the split file is not the one that the run began with, even if another fold was edited."""
    before = directory.read_object("run.json").get("split", identity.split)
    if before["sha256"] != identity.split["sha256"]:
        raise UserError(
            f"--resume would change the run: {identity.split['file']} is not the split file that the run began with, "
            f"{before['file']} with sha256 {before['sha256'][:12]}…; restore that file, or use another --logdir."
        )


def find_newest_checkpoint(logdir: Path, stages: Sequence[str]) -> ResumePoint:
    """Find the newest checkpoint whose bytes match the manifest; damaged ones are renamed to `*.corrupt`.

    Raises:
        UserError: If there are checkpoints and none is valid, so that a run is never restarted silently.
    """
    entries = [(name, entry) for name in stages for entry in read_manifest(logdir / name).entries]
    messages: list[str] = []
    for stage, entry in reversed(entries):
        path = logdir / stage / entry.file
        try:
            checkpoint = read_checkpoint(path)
        except UserError:
            messages.append(_set_aside(path))
            continue
        return ResumePoint(checkpoint, str(path), messages + _describe_lost_steps(entries[-1], stage, entry))
    if entries:
        raise UserError(
            f"--resume finds no valid checkpoint in {logdir}: {' '.join(messages)} Start in another --logdir."
        )
    return ResumePoint()


def _set_aside(path: Path) -> str:
    if not path.exists():
        return f"{path} is missing."
    os.replace(path, f"{path}.corrupt")
    return f"{path} is damaged and was renamed to {path.name}.corrupt."


def _describe_lost_steps(newest: tuple[str, ManifestEntry], stage: str, entry: ManifestEntry) -> list[str]:
    newest_stage, newest_entry = newest
    if newest == (stage, entry):
        return []
    if newest_stage == stage:
        lost = count_of(newest_entry.step - entry.step, "step")
    else:
        lost = f"{count_of(newest_entry.step, 'step')} of {newest_stage}"
    return [f"The run resumes from {stage}/{entry.file}; {lost} will be repeated."]


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str], position: TrainingPosition
) -> None:
    """Raise UserError if an option that affects the results has changed since the run was interrupted.

    Stages that have not begun may change.

    Args:
        old: The options of the checkpoint, as JSON values.
        new: The options now, as JSON values.
        may_change: The names of the options that do not affect the results.
        position: Where the run continues.
    """
    for name in [*new, *(set(old) - set(new))]:
        if name not in may_change and name != "stages" and old.get(name) != new.get(name):
            _refuse(f"--{name.replace('_', '-')}", old.get(name), new.get(name))
    begun = position.stage + 1
    if len(new["stages"]) < begun:
        raise UserError(
            f"--resume would change the run: it is in stage {begun}, and --stages has only {len(new['stages'])}."
        )
    for number, (was, now) in enumerate(zip(old["stages"][:begun], new["stages"], strict=False)):
        for name in was:
            if was[name] != now.get(name):
                _refuse(f"--stages.{number}.{name.replace('_', '-')}", was[name], now.get(name))


def _refuse(flag: str, before: Any, now: Any) -> NoReturn:
    """Raise UserError for one option, with the way to give its former value."""
    if before is None or before == []:
        fix = f"leave {flag} out"
    elif isinstance(before, bool):
        fix = f"give --{'' if before else 'no-'}{flag.removeprefix('--')}"
    elif isinstance(before, list):
        fix = f"give {flag} {' '.join(map(str, before))}"
    else:
        fix = f"give {flag} {before}"
    raise UserError(f"--resume would change the run: {flag} was {before} and is {now}; {fix}, or use another --logdir.")
