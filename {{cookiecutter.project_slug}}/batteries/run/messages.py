"""The messages of a run: before its first step, after each epoch, and at its end."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batteries.core.command_line import shell_command
from batteries.core.errors import RunError, UserError
from batteries.core.ranks import world_size
from batteries.core.signals import Preempted
from batteries.core.text import count_of, list_first
from batteries.run.config import RunConfig
from batteries.run.resume import ResumePoint
from batteries.training.pretrained import PretrainedReport

Metrics = Mapping[str, Mapping[str, float]]


def header_lines(
    config: RunConfig,
    device: torch.device,
    model: nn.Module,
    point: ResumePoint,
    pretrained: PretrainedReport | None,
    samples: Mapping[str, int],
    record: Mapping[str, Any],
) -> list[str]:
    """List the lines before the first step.

    Args:
        config: The options.
        device: The device of this process.
        model: The model.
        point: Where the run continues.
        pretrained: How the pretrained weights fitted, if there are any.
        samples: The number of samples of each split.
        record: The contents of run.json.
    """
    names = ["train", "valid"] if config.ema_decay is None else ["train", "valid", "valid_ema"]
    return [
        f"logdir   {config.logdir}",
        f"device   {describe_device(device, config)}",
        f"data     {', '.join(f'{name} {count:,}' for name, count in samples.items())}",
        f"model    {describe_model(model)}",
        f"weights  {describe_weights(config, point, pretrained)}",
        f"stages   {describe_stages(config)}",
        f"code     {describe_code(record)}",
        f"epochs   metrics are printed as {'/'.join(names)}",
    ]


def describe_device(device: torch.device, config: RunConfig) -> str:
    """Describe the device, the number of processes and threads, the wrapper and the precision."""
    wrapper = " with DistributedDataParallel" if world_size() > 1 and config.shards is None else ""
    if config.data_parallel:
        wrapper = " with DataParallel"
        if device.type != "cuda":
            wrapper += ", which has no effect without a GPU"
    compiled = ", compiled" if config.compile else ""
    return f"{device}, {world_size()} x {torch.get_num_threads()} threads{wrapper}, {config.precision}{compiled}"


def describe_model(model: nn.Module) -> str:
    """Describe the class and the number of parameters."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = "" if trainable == total else f", {trainable:,} of them trainable in the first stage"
    return f"{type(model).__name__}, {total:,} parameters{frozen}"


def describe_weights(config: RunConfig, point: ResumePoint, pretrained: PretrainedReport | None) -> str:
    """Describe where the initial weights come from, or where a resumed run continues."""
    if point.checkpoint is not None:
        return _describe_resume(config, point)
    random = f"random, from seed {config.seed}"
    if pretrained is None:
        return random if config.init_from is None else str(config.init_from)
    parts = [str(config.pretrained)]
    if pretrained.missing:
        parts.append(f"{random}: {list_first(pretrained.missing)}")
    if pretrained.unused:
        parts.append(f"not in the model: {list_first(pretrained.unused)}")
    return "; ".join(parts)


def _describe_resume(config: RunConfig, point: ResumePoint) -> str:
    position = point.position
    stage = config.stages[position.stage]
    if position.epoch <= stage.epochs:
        return f"resumed from {point.name}, in {stage.name} epoch {position.epoch} after {position.step} steps"
    if position.stage + 1 < len(config.stages):
        return f"resumed from {point.name}, the end of {stage.name}"
    return f"resumed from {point.name}: already finished"


def describe_stages(config: RunConfig) -> str:
    """Describe the stages with their epochs, and the size of a step."""
    stages = [f"{stage.name} {count_of(stage.epochs, 'epoch')} lr {stage.lr:g}" for stage in config.stages]
    step = f"{config.batch_size} samples per step"
    if config.shards is not None:
        step += f" in {count_of(config.shards, 'shard')}"
    elif config.accumulation_steps > 1:
        step += f" in {config.accumulation_steps} micro-batches"
    return ", ".join([*stages, step])


def describe_code(record: Mapping[str, Any]) -> str:
    """Describe the git commit, whether there are changes, and the version of torch."""
    commit = record["git_commit"]
    code = "no git commit" if commit is None else f"git {commit[:7]} on {record['git_branch'] or 'no branch'}"
    changes = ", with the changes in git.diff" if record["git_dirty"] else ""
    return f"{code}{changes}; torch {torch.__version__}"


def epoch_line(label: str, metrics: Metrics, seconds: float, comment: str) -> str:
    """Format one epoch as one line: each metric as `train/valid`, so that a gap between them shows.

    Metrics of single classes, such as `iou/cat`, are only in metrics.jsonl.
    """
    names = sorted({name for values in metrics.values() for name in values if "/" not in name})
    parts = [label]
    for name in names:
        values = [f"{values[name]:.4f}" for values in metrics.values() if name in values]
        parts.append(f"{name} {'/'.join(values)}")
    parts.append(f"{seconds:.1f} s")
    if comment:
        parts.append(comment)
    return "  ".join(parts)


def describe_improvement(score: float, before: float | None, is_best: bool) -> str:
    """Describe how a score compares with the best one before it."""
    if not is_best:
        return ""
    return "best" if before is None else f"best by {abs(score - before):.4f}"


def end_lines(best: Mapping[str, Any], path: Path, logdir: Path, dashboards: Sequence[str]) -> list[str]:
    """List the lines after the last step: the best score, the files, the dashboards and the next command."""
    score = "nan" if best["score"] is None else f"{best['score']:.4f}"
    where = "" if best["epoch"] is None else f" in {best['stage']} epoch {best['epoch']}"
    next_command = shell_command("python", "tools/predict.py", "--run", str(logdir), "--split", "test")
    return [
        f"best     {best['metric']} {score}{where}: {path}",
        f"files    {logdir}",
        *[f"curves   {dashboard}" for dashboard in dashboards if dashboard],
        f"next     {next_command}",
    ]


def describe_exit(error: BaseException | None, stopped_early: bool) -> str:
    """Describe how a run ended, for run.json."""
    if error is None:
        return "stopped early" if stopped_early else "finished"
    if isinstance(error, Preempted):
        return f"preempted by {signal.Signals(error.number).name}"
    name = "" if isinstance(error, UserError | RunError) else f"{type(error).__name__}: "
    return f"failed: {name}{error}"


def advise_out_of_memory(config: RunConfig, device: torch.device) -> str:
    """Suggest options after the device ran out of memory: smaller micro-batches, of two samples or more."""
    batch_size = config.batch_size
    ranks = world_size()
    if config.shards is not None:
        more = f"--shards {2 * config.shards}, " if batch_size // config.shards % 2 == 0 else ""
        return (
            f"{device} ran out of memory with shards of {count_of(batch_size // config.shards, 'sample')}; start a run "
            f"in another --logdir with {more}a smaller model or smaller images, or --precision bf16."
        )
    present = config.accumulation_steps
    possible = range(2 * present, batch_size // ranks // 2 + 1)
    allowed = [steps for steps in possible if batch_size % (steps * ranks) == 0]
    problem = f"{device} ran out of memory with micro-batches of {count_of(batch_size // present // ranks, 'sample')}"
    if not allowed:
        return f"{problem}; use a smaller model or smaller images, or --precision bf16."
    return (
        f"{problem}; use --accumulation-steps {allowed[0]} with --batch-size {batch_size}: micro-batches of "
        f"{batch_size // allowed[0] // ranks}, and still {batch_size} samples per step. "
        "A smaller --valid-batch-size can help too."
    )
