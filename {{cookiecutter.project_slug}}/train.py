"""Train a model on one fold of the data. Read from top to bottom; everything here is yours to change.

    scripts/train_device.sh --logdir logs/first --stages.0.epochs 3
    scripts/train_device.sh --config logs/first/config.json --logdir logs/again

The parts that one can only get wrong (random streams, shards, accumulation, checkpoints, process groups) are in
batteries/; what is learned, and from what, is in experiment/. One process is the same program as eight.
Relative paths count from the folder that holds this file when you use scripts/.
"""

import math
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends them without a traceback

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from batteries import (
    Averages,
    BadInput,
    CheckpointManager,
    Epoch,
    EvalLoader,
    Run,
    Stream,
    Tracker,
    TrainLoader,
    accumulate,
    check_batchnorm,
    default_tracker,
    evaluation,
    fingerprint,
    first_on_each_machine,
    load_checkpoint,
    place_model,
    random_stream,
    run_command,
    seed_all,
    start_process,
)
from experiment.augmentations import normalize, train_transform, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_criterion, build_model
from experiment.splits import split_dataset


@dataclass(frozen=True)
class Stage:
    """A phase of the run, with its own epochs, learning rate and checkpoints."""

    name: str  # its folder in the logdir
    epochs: int  # passes over the train split
    lr: float  # the highest learning rate of the stage


@dataclass(frozen=True)
class Config:
    """Train a model. `--config logs/x/config.json` repeats a run; flags beside it win."""

    # The recipe: what you change most.
    stages: tuple[Stage, ...] = (Stage("stage0", epochs=6, lr=3e-3), Stage("stage1", epochs=3, lr=3e-4))
    batch_size: int = 32  # samples per optimizer step, over all ranks and micro-batches; small, for many steps
    accumulation_steps: int = 1  # micro-batches per step; more of them need less memory
    weight_decay: float = 0.05  # AdamW's, as for small networks (Loshchilov and Hutter 2019)
    main_metric: Literal["accuracy", "loss"] = "accuracy"  # the validation metric that ranks checkpoints
    minimize_metric: bool = False  # whether less of it is better
    save_n_best: int = 3  # checkpoints kept per stage beside the two newest; averaging wants several

    # The data.
    data_dir: Path = Path("data")  # where data sets that are files are kept
    fold: int = 0  # which fold validates, from 0; the others train
    seed: int = 0  # of everything random but the split, 0 to 2^32 - 1
    drop_last: bool = True  # leave out an epoch's short last step: few samples make noisy steps
    valid_batch_size: int = 256  # samples that one rank validates at once; changes memory and speed, not scores
    num_workers: int | None = None  # loader processes per rank; by default from the machine, 0 on a CPU
    limit_batches: int | None = None  # at most so many steps and validation batches an epoch: a smoke run

    # The machine.
    logdir: Path = Path("logs/baseline")  # the run's folder; one that holds a run is refused without --resume
    init_from: Path | None = None  # a checkpoint, whose weights a new run starts from instead of random ones
    resume: bool = False  # go on with the run in the logdir, bit for bit; start it where there is none
    checkpoint_every_minutes: float | None = 10  # between checkpoints within an epoch, beside the one at its end
    checkpoint_every_steps: int | None = None  # the same, counted in steps
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto takes a GPU where there is one
    data_parallel: bool = False  # DataParallel over all visible GPUs, in one process
    sync_batchnorm: bool = True  # under DDP, batch norm over all ranks; without it each rank's own few samples
    deterministic: bool = True  # same bits again on the same machine; without it cudnn picks the fastest kernels
    sharing_strategy: Literal["file_system", "file_descriptor"] = "file_system"  # file_descriptor runs out of files
    show_warnings: bool = False  # python warnings of libraries, quiet by default
    tracker: Tracker = field(default_factory=default_tracker)  # where curves go beside metrics.jsonl

    def __post_init__(self) -> None:
        """Refuse what cannot be meant. What needs the data or the machine is checked where they are known."""
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise BadInput(f"--stages need one or more, of different names, not {', '.join(names) or 'none'}.")
        for number, stage in enumerate(self.stages):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name) or stage.name in ("tensorboard", "predictions", "plots"):
                raise BadInput(
                    f"--stages.{number}.name {stage.name!r} must be the name of a folder of its own: a-z, 0-9, _, -."
                )
            if stage.epochs < 1:
                raise BadInput(f"--stages.{number}.epochs {stage.epochs} must be 1 or more.")
            if not 0 < stage.lr < math.inf:
                raise BadInput(f"--stages.{number}.lr {stage.lr} must be over 0 and finite.")
        if not 0 <= self.weight_decay < math.inf:
            raise BadInput(f"--weight-decay {self.weight_decay} must be 0 or more and finite.")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"--seed {self.seed} must be 0 to {2**32 - 1}.")
        for flag in (
            "accumulation_steps",
            "save_n_best",
            "valid_batch_size",
            "limit_batches",
            "checkpoint_every_steps",
        ):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise BadInput(f"--{flag.replace('_', '-')} {value} must be at least 1.")
        if self.main_metric == "loss" and not self.minimize_metric:
            raise BadInput("--main-metric loss is better when it is less: give --minimize-metric too.")
        if self.main_metric == "accuracy" and self.minimize_metric:
            raise BadInput("--main-metric accuracy is better when it is more: leave --minimize-metric out.")


# What may be given otherwise to a run that is resumed: it changes no number.
MAY_CHANGE = (
    *(
        "data_dir",
        "num_workers",
        "save_n_best",
        "logdir",
        "init_from",
        "checkpoint_every_minutes",
        "checkpoint_every_steps",
    ),
    *("device", "sharing_strategy", "show_warnings", "tracker"),
)


def main(config: Config) -> float:
    """Train all stages of a run; the best validation score over them."""
    with start_process(
        config.device,
        deterministic=config.deterministic,
        sharing_strategy=config.sharing_strategy,
        show_warnings=config.show_warnings,
    ) as device:
        seed_all(config.seed)
        dataset = first_on_each_machine(lambda: load_dataset(config.data_dir))
        split = split_dataset(np.asarray(dataset.targets), dataset.classes, config.fold)
        train_loader = TrainLoader(
            dataset,
            split.train,
            train_transform(),
            device,
            seed=config.seed,
            batch_size=config.batch_size,
            accumulation_steps=config.accumulation_steps,
            drop_last=config.drop_last,
            limit_batches=config.limit_batches,
            num_workers=config.num_workers,
        )
        valid_loader = EvalLoader(
            dataset,
            split.valid,
            valid_transform(),
            device,
            batch_size=config.valid_batch_size,
            limit_batches=config.limit_batches,
            num_workers=config.num_workers,
        )
        model_args = {"num_classes": len(dataset.classes)}
        with random_stream(config.seed, Stream.WEIGHTS):
            model = build_model(**model_args)
        check_batchnorm(model, train_loader, synchronised=config.sync_batchnorm)
        model = place_model(model, device, data_parallel=config.data_parallel, sync_batchnorm=config.sync_batchnorm)
        data = fingerprint(dataset.fingerprint(), *split)
        run = Run(config.logdir, config, device, model_args=model_args, data=data, may_change=MAY_CHANGE)
        # Where weights come from: the run's own checkpoint, then --init-from, then the seed.
        if config.init_from is not None and not run.has_begun(0):
            load_checkpoint(config.init_from, model)
        with run:
            run.say_start(model, {name: len(part) for name, part in split._asdict().items()})
            stages: list[CheckpointManager] = []
            for number in range(len(config.stages)):
                if stages and not run.has_begun(number):
                    load_checkpoint(stages[-1].best_path(), model)
                stages.append(train_stage(number, model, train_loader, valid_loader, run, config))
            return run.finish(stages)


def train_stage(
    number: int, model: nn.Module, train_loader: TrainLoader, valid_loader: EvalLoader, run: Run, config: Config
) -> CheckpointManager:
    """Train stage `number` (from 0) and keep its checkpoints in its folder."""
    stage = config.stages[number]
    criterion = build_criterion()
    # fused: one pass over all weights, 8 ms a step instead of 30 to 50 (resnet18 on 2 cores, torch 2.15).
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=config.weight_decay, fused=True)
    # Smith and Topin 2019: a warm-up from lr / 25, then a cosine to nearly nothing; counted in optimizer steps.
    scheduler = OneCycleLR(optimizer, max_lr=stage.lr, total_steps=stage.epochs * len(train_loader))
    checkpoints = CheckpointManager(
        run.logdir / stage.name, config.main_metric, config.minimize_metric, config.save_n_best
    )
    start = run.begin_stage(number, model, optimizer, scheduler, checkpoints)
    for epoch in range(start.epoch, stage.epochs + 1):
        batches = train_loader.epoch(number, epoch, start.step if epoch == start.epoch else 0)
        train = train_fn(model, batches, criterion, optimizer, scheduler, run, f"{stage.name} {epoch}/{stage.epochs}")
        valid = valid_fn(model, valid_loader, criterion, run)
        step, score = epoch * len(train_loader), valid[config.main_metric]
        lr = float(scheduler.get_last_lr()[0])
        run.log_epoch(stage.name, epoch, step, lr, train, valid, checkpoints.is_better(score))
        checkpoint = run.make_checkpoint(epoch, step, {"train": train, "valid": valid})
        checkpoints.process(score=score, epoch=epoch, checkpoint=checkpoint)
    return checkpoints


def train_fn(
    model: nn.Module,
    batches: Epoch,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    run: Run,
    label: str,
) -> dict[str, float]:
    """One pass over the train split; the mean of each metric over its samples, as they were seen."""
    model.train()
    metrics = Averages(run.device)
    for batch in run.track(batches, metrics, label):
        with accumulate(model, batch):
            logits = model(normalize(batch.images))  # (N, classes)
            loss = criterion(logits, batch.targets)
            (loss * batch.share).backward()  # micro-batches add up to the mean over the whole step
        metrics.update(len(batch.targets), loss=loss, accuracy=logits.argmax(1) == batch.targets)
        if batch.ends_step:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return metrics.compute()


def valid_fn(model: nn.Module, loader: EvalLoader, criterion: nn.Module, run: Run) -> dict[str, float]:
    """The mean of each metric over the validation split, every sample once."""
    metrics = Averages(run.device)
    with evaluation(model) as network:
        for images, targets in loader:
            logits = network(normalize(images))  # (N, classes)
            metrics.update(len(targets), loss=criterion(logits, targets), accuracy=logits.argmax(1) == targets)
    return metrics.compute(expected_count=loader.size)


if __name__ == "__main__":
    run_command(main, Config)
