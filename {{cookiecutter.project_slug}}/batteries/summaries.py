"""What a run says of itself: before its first step, after each epoch, and at its end."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batteries.cli import as_typed
from batteries.errors import BadInput, RunFailed, shorten
from batteries.interrupts import Stopped
from batteries.ranks import world_size
from batteries.resume import Found
from batteries.weights import Pretrained

Metrics = Mapping[str, Mapping[str, float]]


def describe_device(device: torch.device, config: Mapping[str, Any]) -> str:
    """What computes, how many of it, and in which precision."""
    wrapper = " with DistributedDataParallel" if world_size() > 1 else ""
    if config["data_parallel"]:
        alone = "" if device.type == "cuda" else ", which has no GPU to share the work with"
        wrapper = f" with DataParallel{alone}"
    compiled = ", compiled" if config["compile"] else ""
    return f"{device}, {world_size()} x {torch.get_num_threads()} threads{wrapper}, {config['precision']}{compiled}"


def describe_model(model: nn.Module) -> str:
    """Its class and size."""
    parameters = list(model.parameters())
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    frozen = "" if learning == total else f", {learning:,} of them learn at first"
    return f"{type(model).__name__}, {total:,} parameters{frozen}"


def describe_weights(config: Mapping[str, Any], found: Found, pretrained: Pretrained | None) -> str:
    """Where the first weights come from, and where a resumed run goes on."""
    if found.checkpoint is None:
        random = f"random, from seed {config['seed']}"
        if pretrained is None:
            return config["init_from"] or random
        said = [config["pretrained"]]
        said += [f"{random}: {shorten(pretrained.left)}"] if pretrained.left else []
        said += [f"not in the model: {shorten(pretrained.unused)}"] if pretrained.unused else []
        return "; ".join(said)
    stages, (stage, epoch, step) = config["stages"], found.cursor
    if epoch <= stages[stage]["epochs"]:
        return f"resumed from {found.name}, in {stages[stage]['name']} epoch {epoch} after {step} steps"
    if stage + 1 < len(stages):
        return f"resumed from {found.name}, the end of {stages[stage]['name']}"
    return f"resumed from {found.name}: finished already"


def describe_stages(config: Mapping[str, Any]) -> str:
    """The stages with their epochs, and what a step is."""
    stages = ", ".join(
        f"{one['name']} {one['epochs']} epoch{'s' * (one['epochs'] > 1)} lr {one['lr']:g}" for one in config["stages"]
    )
    pieces = f" in {config['accumulation_steps']} micro-batches" if config["accumulation_steps"] > 1 else ""
    return f"{stages}, {config['batch_size']} samples a step{pieces}"


def describe_code(record: Mapping[str, Any]) -> str:
    """The commit that runs, and what it was changed by."""
    commit = record["git_commit"]
    code = "git without a commit" if commit is None else f"git {commit[:7]} on {record['git_branch'] or 'no branch'}"
    changes = ", changed as git.diff says" if record["git_dirty"] else ""
    return f"{code}{changes}; torch {torch.__version__}"


def epoch_line(label: str, metrics: Metrics, seconds: float, news: str) -> str:
    """One line: each metric as `train/valid`, so that a gap between them is seen at once."""
    names = dict.fromkeys(name for values in metrics.values() for name in sorted(values))
    values = (f"{name} {'/'.join(f'{part[name]:.4f}' for part in metrics.values() if name in part)}" for name in names)
    return "  ".join([label, *values, f"{seconds:.1f} s", *([news] if news else [])])


def improvement(score: float, before: float | None, is_best: bool) -> str:
    """What an epoch made better."""
    if not is_best:
        return ""
    return "best" if before is None else f"best, {score - before:+.4f}"


def end_lines(best: Mapping[str, Any], path: Path, logdir: Path, look: Sequence[str]) -> list[str]:
    """The best score, where everything is, and what comes next."""
    score = "nan" if best["score"] is None else f"{best['score']:.4f}"
    where = "" if best["epoch"] is None else f" in {best['stage']} epoch {best['epoch']}"
    lines = [f"best     {best['metric']} {score}{where}: {path}", f"files    {logdir}"]
    lines += [f"look     {one}" for one in look if one]
    return [*lines, f"next     {as_typed('python', 'predict.py', '--run', str(logdir), '--split', 'test')}"]


def describe_end(error: BaseException | None, stopped_early: bool) -> str:
    """How a run ended, for run.json."""
    if error is None:
        return "stopped early" if stopped_early else "finished"
    if isinstance(error, Stopped):
        return f"preempted by {signal.Signals(error.number).name}"
    name = "" if isinstance(error, BadInput | RunFailed) else f"{type(error).__name__}: "
    return f"failed: {name}{error}"
