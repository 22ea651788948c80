"""Find where a run continues: after its newest valid checkpoint.

Random streams follow from (seed, stage, epoch, position), so no generator state is saved: a position is enough.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from batteries.checkpoint.io import DamagedCheckpoint, check_architecture, read_checkpoint
from batteries.checkpoint.manifest import ManifestEntry, read_manifest
from batteries.core.config_io import flatten, update_saved
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
        config_class: The dataclass of the options.
        config: The options, as JSON values.
        may_change: The names of the options that do not affect the results.
        data: The fingerprint of the training data and their split.
        split: The output of `SplitFile.describe`.
        model: The output of `describe_architecture`.
        code: The sha256 of train.py and of each file in experiment/; a change is only reported.
    """

    config_class: Any
    config: Mapping[str, Any]
    may_change: Sequence[str]
    data: str
    split: Mapping[str, Any]
    model: Mapping[str, Any]
    code: Mapping[str, str]


@dataclass
class ResumePoint:
    """The newest valid checkpoint of a run.

    Attributes:
        checkpoint: Its contents; None for a new run, or one that has no checkpoint yet.
        name: Its path.
        messages: What the user should know: damaged files, steps that are repeated, changes.
        config: The options of the run before it is resumed, as JSON values; empty for a new run.
    """

    checkpoint: dict[str, Any] | None = None
    name: str = ""
    messages: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)

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
    if point.checkpoint is None:
        _check_start(point, directory, identity)
    else:
        _check_checkpoint(point, point.checkpoint, directory, identity, model, names)
    return point


def _check_start(point: ResumePoint, directory: RunDirectory, identity: RunIdentity) -> None:
    """Raise UserError if a run without a checkpoint is not the one that began in the directory."""
    point.config = directory.read_object("config.json")
    record = directory.read_object("run.json")
    if point.config:
        _check_options(point, directory, identity)
        for name in INITIAL_WEIGHT_OPTIONS:
            before, now = point.config.get(name), identity.config[name]
            if now not in (None, before):
                _refuse(name, before, now)
    if record.get("data", identity.data) != identity.data:
        raise UserError(
            "--resume would change the run: the data or their split differ from those with which it began. Restore "
            "them, or use another --logdir."
        )
    before = record.get("model", identity.model)
    if before != identity.model:
        was, now = (_describe_model(model) for model in (before, identity.model))
        raise UserError(
            f"--resume would change the run: the model was {was} and is {now}; restore it, or use another --logdir."
        )
    point.messages += describe_code_changes(record.get("code", identity.code), identity.code)


def _describe_model(model: Mapping[str, Any]) -> str:
    """Describe the output of `describe_architecture`; two architectures never have the same description."""
    parameters = count_of(model["parameters"], "parameter")
    return f"{model['class']} with {parameters} (sha256 of its tensors' names and shapes {model['sha256'][:12]})"


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
    point.config = checkpoint["experiment_args"]
    _check_options(point, directory, identity)
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
    point.messages += describe_environment_changes(saved, next(model.parameters()).device)
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
        UserError: If there are checkpoints and none is valid, so that a run is never restarted silently; or if one
            whose bytes match cannot be read.
    """
    entries = [(name, entry) for name in stages for entry in read_manifest(logdir / name).entries]
    messages: list[str] = []
    for stage, entry in reversed(entries):
        path = logdir / stage / entry.file
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint:
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


def _check_options(point: ResumePoint, directory: RunDirectory, identity: RunIdentity) -> None:
    """Raise UserError if an option that affects the results has changed since the run was interrupted.

    Stages that have not begun may change. An option that the run did not have yet had its default.
    """
    old = update_saved(identity.config_class, point.config)
    new = {name: value for name, value in identity.config.items() if name not in identity.may_change}
    begun = point.position.stage + 1
    if len(new["stages"]) < begun:
        raise UserError(
            f"--resume would change the run: it is in stage {begun}, and --stages has only {len(new['stages'])}; "
            f"give --config {directory.path / 'config.json'}, or use another --logdir."
        )
    old = {name: old[name] for name in new if name in old}
    before = dict(flatten(old | {"stages": old["stages"][:begun]}))
    for name, now in flatten(new | {"stages": new["stages"][:begun]}):
        if name not in before:
            raise UserError(
                f"--resume would change the run: it began without {_flag(name)}, which has no default; give it a "
                "default in train.py, or use another --logdir."
            )
        if before[name] == now:
            continue
        if re.fullmatch(r"stages\.\d+\.epochs", name) and now > before[name]:
            _refuse(name, before[name], now, _more_epochs(directory.path, old["stages"][:begun]))
        _refuse(name, before[name], now)
    point.messages += _describe_removed_options(point.config, identity)


def _describe_removed_options(saved: Mapping[str, Any], identity: RunIdentity) -> list[str]:
    """Return a message with the options of the run that do not exist any more, or none."""
    present = dict(flatten(update_saved(identity.config_class, saved)))
    removed = [f"{_flag(name)} {value}" for name, value in flatten(saved) if name not in present]
    if not removed:
        return []
    return [f"Options of the run that no longer exist have no effect: {', '.join(removed)}."]


def _more_epochs(logdir: Path, stages: Sequence[Mapping[str, Any]]) -> str:
    """Return how to train for more epochs than a stage has: its learning rates depend on their number."""
    best = [path for stage in stages if (path := logdir / stage["name"] / "best.pth").is_file()]
    start = f"start a run in another --logdir with --init-from {best[-1]}" if best else "use another --logdir"
    return f"and add a stage in train.py or in the file of --config, or {start}"


def _refuse(name: str, before: Any, now: Any, others: str = "or use another --logdir") -> NoReturn:
    """Raise UserError for one option.

    Args:
        name: The option, such as stages.0.lr.
        before: Its value when the run was interrupted.
        now: Its value now.
        others: What else helps.
    """
    flag = _flag(name)
    if isinstance(before, bool):
        path, dot, last = flag.removeprefix("--").rpartition(".")
        fix = flag if before else f"--{path}{dot}no-{last}"
    elif before == []:
        fix = f"{flag} without a value"
    elif isinstance(before, list):
        fix = shlex.join([flag, *map(str, before)])
    else:
        fix = shlex.join([flag, str(before)])
    raise UserError(f"--resume would change the run: {flag} was {before} and is {now}; give {fix}, {others}.")


def _flag(name: str) -> str:
    """Return the flag of an option, such as stages.0.image_size."""
    return f"--{name.replace('_', '-')}"
