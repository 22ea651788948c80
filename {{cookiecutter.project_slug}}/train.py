"""Train a model on one fold of the data. Read it from top to bottom and change what you need.

    scripts/train_device.sh --logdir logs/first --stages.0.epochs 3
    scripts/train_device.sh --config logs/first/config.json --logdir logs/again

The data, the model, the task (loss and metrics) and the augmentations are in experiment/. The toolkit is in batteries/:
deterministic data loading, gradient accumulation, checkpoints and resume, distributed setup and logging. The same
program runs in one process and in many. With the launch scripts, relative paths are relative to this directory.
"""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below exits without a traceback

import torch
from torch import nn

from batteries.checkpoint.io import load_weights
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.command_line import run_command
from batteries.core.config_io import use_plain_numbers
from batteries.core.errors import UserError
from batteries.core.seeding import Stream, random_stream, seed_all
from batteries.core.validators import Count, NotNegative, Positive, Seed, UnitInterval, check_ranges
from batteries.data.dataset import Dataset
from batteries.data.fingerprint import fingerprint
from batteries.data.image_grid import sample_grid
from batteries.data.loaders import EpochBatches, EvalLoader, TrainLoader
from batteries.data.sampling import Sampling
from batteries.data.splits import Split, SplitFile, check_files
from batteries.data.summary import log_new_split
from batteries.distributed.collectives import local_rank_zero_first
from batteries.models.options import model_arguments
from batteries.run.directory import check_stages, is_resumed
from batteries.run.run import Run
from batteries.tracking.base import TrackerName
from batteries.tracking.manager import default_trackers
from batteries.training.criterion import prepare_criterion
from batteries.training.early_stopping import EarlyStopping
from batteries.training.ema import EMA, warn_of_short_stages
from batteries.training.metrics import MeanMetrics, PredictionCollector, check_main_metric, check_metrics, main_score
from batteries.training.optimizer_step import optimizer_step
from batteries.training.parameters import check_module_names, freeze, parameter_groups, train_mode
from batteries.training.precision import Precision, autocast, make_scaler
from batteries.training.schedules import Schedule, make_schedule, print_schedule
from batteries.training.setup import setup_training
from batteries.training.state import SilentLogger, StepLogger, TrainState
from batteries.training.wrap import accumulate, check_batchnorm, eval_mode, prepare_model, wrap_model
from experiment import task
from experiment.augmentations import normalize, train_transform, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.splits import make_folds


@dataclass(frozen=True)
class Stage:
    """A phase of the run, with its own epochs, learning rate and checkpoints."""

    name: str  # subdirectory of the logdir
    epochs: Count  # passes over the train split
    lr: Positive  # maximum learning rate of the stage
    schedule: Schedule = "one-cycle"  # learning-rate schedule; preview it with --show-schedule
    warmup_epochs: NotNegative = 0  # epochs of linear warmup (cosine, multi-step and constant only)
    freeze: tuple[str, ...] = ()  # modules to freeze, such as layer1; they also keep their batch norm statistics
    image_size: Count | None = None  # height and width in pixels; by default that of experiment/augmentations.py
    start: Literal["best", "last"] = "best"  # the checkpoint of the previous stage that this stage starts from


@dataclass(frozen=True)
class Config:
    """Train a model. `--config logs/x/config.json` repeats a run; other options override it."""

    # The recipe: the options that change most often.
    stages: tuple[Stage, ...] = (Stage("stage0", epochs=6, lr=3e-3), Stage("stage1", epochs=3, lr=3e-4))
    batch_size: Count = 32  # samples per optimizer step, over all ranks and micro-batches
    accumulation_steps: Count = 1  # micro-batches per optimizer step; more of them need less memory
    shards: Count | None = None  # shards per step; 8: same bits for 1, 2, 4, 8 processes; batch norm is per shard
    model: str | None = None  # network, such as resnet34; by default that of experiment/model.py
    model_args: tuple[str, ...] = ()  # its arguments, such as dropout=0.1
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: Nesterov momentum 0.9; needs a larger lr, such as 0.1
    weight_decay: NotNegative = 0.05  # weight decay of matrices and kernels; biases and norms have none
    clip_norm: Positive | None = None  # maximum global gradient norm; 1.0 is common for transformers
    label_smoothing: UnitInterval = 0.0  # fraction of the target spread over all classes, in training only; often 0.1
    class_weights: str | None = None  # balanced, or a CSV file with columns class and weight; in training only
    mixup: NotNegative = 0.0  # alpha of mixup; 0 disables it; mixing needs more epochs
    cutmix: NotNegative = 0.0  # alpha of CutMix; 0 disables it; with mixup too, each step uses one of them
    ema_decay: UnitInterval | None = None  # EMA decay, 0.99 to 0.9999; at most (1 + t) / (10 + t) at step t
    patience: Count | None = None  # stop a stage early after this many epochs without improvement
    min_delta: NotNegative = 0.0  # minimum improvement that resets --patience
    main_metric: str = task.MAIN_METRIC  # what ranks checkpoints: one of SCORES, or any metric that valid_fn reports
    minimize_metric: bool = task.MINIMIZE_METRIC  # the main metric is better when it is lower
    scores: tuple[str, ...] = task.LOGGED_SCORES  # more metrics of SCORES to log
    save_n_best: Count = 3  # checkpoints kept per stage besides the two newest; averaging needs several

    # The data.
    data_dir: Path = Path("data")  # directory of the data set
    split_file: Path = Path("splits/default.csv")  # train, valid and test samples; created if it does not exist
    fold: int = 0  # the fold used for validation, from 0; tools/split.py --num-folds sets their number
    seed: Seed = 0  # seed of everything random except the split, 0 to 2^32 - 1
    sampling: Sampling = "shuffled"  # balanced: rare classes are repeated, so that all classes are equally frequent
    drop_last: bool = True  # skip the short last step of an epoch
    valid_batch_size: Count = 256  # validation samples per rank and batch; affects memory, speed and the last digits
    num_workers: int | None = None  # loader processes per rank; by default chosen for the machine, 0 on a CPU
    limit_batches: Count | None = None  # maximum steps and validation batches per epoch, for a smoke test

    # The machine.
    logdir: Path = Path("logs/baseline")  # directory of the run; one that already holds a run needs --resume
    resume: bool = False  # continue the run in the logdir exactly; starts it if there is none
    init_from: Path | None = None  # checkpoint whose weights initialise a new run
    pretrained: str | None = None  # torchvision weights (ResNet18_Weights.DEFAULT), a file or URL#sha256=…
    checkpoint_every_minutes: NotNegative | None = 10  # minutes between checkpoints within an epoch
    checkpoint_every_steps: Count | None = None  # optimizer steps between checkpoints within an epoch
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto prefers a GPU
    data_parallel: bool = False  # DataParallel over all visible GPUs in one process; DDP is faster
    sync_batchnorm: bool = True  # SyncBatchNorm under DDP, without --shards; otherwise statistics are per rank
    find_unused_parameters: bool = False  # under DDP, for models that do not use all parameters in each step; slower
    precision: Precision = "fp32"  # bf16, fp16: about half the time and memory on recent GPUs; fp16 scales the loss
    tf32: bool = True  # TF32 matrix products in fp32 on NVIDIA GPUs: faster, with 10 bits of mantissa
    channels_last: bool = False  # channels-last memory format, faster for convolutions on tensor cores
    compile: bool = False  # torch.compile: faster steps after a minute or more of compilation
    deterministic: bool = True  # deterministic kernels; otherwise cuDNN chooses the fastest ones
    sharing_strategy: Literal["file_system", "file_descriptor"] = "file_system"  # how workers share tensors
    show_warnings: bool = False  # show Python warnings of libraries
    show_schedule: bool = False  # print the learning rate of each epoch and exit
    profile: bool = False  # write a trace of a few steps to logdir/profile
    tracker: tuple[TrackerName, ...] = field(default_factory=default_trackers)  # trackers besides metrics.jsonl
    report: bool = True  # at the end, run the report scripts listed in pyproject.toml
    quiet: bool = False  # print only warnings; train.log has everything

    def __post_init__(self) -> None:
        """Validate option combinations. Checks that need the data or the device come later."""
        use_plain_numbers(self)
        check_ranges(self)
        check_stages(self.stages)
        check_metrics(self, task)
        if self.init_from is not None and self.pretrained is not None:
            raise UserError("--init-from and --pretrained both set the initial weights; give one of them.")
        if self.min_delta and self.patience is None:
            raise UserError(f"--min-delta {self.min_delta} has no effect without --patience; give both.")


# Options that may differ on --resume because they do not affect the results.
# fmt: off
MAY_CHANGE = (
    "data_dir", "split_file", "num_workers", "save_n_best", "logdir", "init_from", "pretrained",
    "checkpoint_every_minutes", "checkpoint_every_steps", "device", "find_unused_parameters", "sharing_strategy",
    "show_warnings", "show_schedule", "profile", "tracker", "report", "quiet",
)
# fmt: on


def main(config: Config) -> float:
    """Train all stages of a run and return the best value of the main metric."""
    with setup_training(config) as device:
        seed_all(config.seed)
        dataset = local_rank_zero_first(lambda: load_dataset(config.data_dir))
        split_file = SplitFile(config.split_file, dataset, make_folds)
        split = split_file.select(config.fold)
        if not is_resumed(config):  # its files were checked at the first start
            check_files(dataset, split)
        train_loader, _ = make_loaders(config.stages[0], dataset, split, device, config)
        if config.show_schedule:
            return print_schedule(config.stages, len(train_loader))
        model_args = model_arguments(build_model, len(dataset.classes), config.model, config.model_args)
        with random_stream(config.seed, Stream.WEIGHTS):
            model = build_model(**model_args)
        synchronised = config.sync_batchnorm and config.shards is None  # otherwise statistics are those of a shard
        model = prepare_model(model, device, sync_batchnorm=synchronised, channels_last=config.channels_last)
        check_batchnorm(model, train_loader, synchronised=synchronised)
        check_module_names(model, config.stages)
        freeze(model, config.stages[0].freeze)
        task.build_criterion(config.label_smoothing, train_loader.class_weights)  # rejects what the task does not have

        def validate(small: Config) -> dict[str, float]:
            _, valid_loader = make_loaders(config.stages[0], dataset, split, device, small)
            return valid_fn(model, valid_loader, SilentLogger(device), small)

        check_main_metric(config, task, validate)
        run = Run(
            config,
            device,
            model,
            model_args=model_args,
            data=fingerprint(dataset.fingerprint(), *split),
            split=split_file.describe(),
            may_change=MAY_CHANGE,
        )
        run.load_initial_weights()  # replaces the random ones; a resumed run has its own
        split_file.write()
        with run:
            run.log_header(split.sizes())
            log_new_split(split_file)
            warn_of_short_stages(config.ema_decay, config.stages, len(train_loader))
            run.log_image("samples", lambda: sample_grid(train_loader, normalize))
            stage_checkpoints: list[CheckpointManager] = []
            for number, stage in enumerate(config.stages):
                if stage_checkpoints and not run.has_begun(number):
                    load_weights(stage_checkpoints[-1].path_of(stage.start), model)
                train_loader, valid_loader = make_loaders(stage, dataset, split, device, config)
                stage_checkpoints.append(train_stage(number, model, train_loader, valid_loader, run, config))
            return run.finish(stage_checkpoints)


def make_loaders(
    stage: Stage, dataset: Dataset, split: Split, device: torch.device, config: Config
) -> tuple[TrainLoader, EvalLoader]:
    """Build the train and valid loaders of a stage."""
    train_loader = TrainLoader(
        dataset,
        split.train,
        train_transform(stage.image_size),
        device,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        shards=config.shards,
        sampling=config.sampling,
        class_weights=config.class_weights,
        drop_last=config.drop_last,
        limit_batches=config.limit_batches,
        num_workers=config.num_workers,
        mixer=task.batch_transform(len(dataset.classes), config.mixup, config.cutmix),
    )
    valid_loader = EvalLoader(
        dataset,
        split.valid,
        valid_transform(stage.image_size),
        device,
        batch_size=config.valid_batch_size,
        limit_batches=config.limit_batches,
        num_workers=config.num_workers,
    )
    return train_loader, valid_loader


def train_stage(
    number: int, model: nn.Module, train_loader: TrainLoader, valid_loader: EvalLoader, run: Run[Config], config: Config
) -> CheckpointManager:
    """Train stage `number` (from 0) and return its checkpoints."""
    stage = config.stages[number]
    freeze(model, stage.freeze)
    state = build_state(model, stage, len(train_loader), run.device, config)
    checkpoints = CheckpointManager(
        logdir=run.logdir / stage.name,
        metric=config.main_metric,
        metric_minimization=config.minimize_metric,
        save_n_best=config.save_n_best,
        writer=run.writer,
    )
    stage_run = run.begin_stage(number, state, checkpoints)  # restores the state if the stage is resumed
    start = stage_run.position
    for epoch in range(start.epoch, stage.epochs + 1):
        batches = train_loader.epoch(number, epoch, first_step=start.step if epoch == start.epoch else 0)
        metrics = {"train": train_fn(state, batches, stage_run, config)}
        metrics["valid"] = valid_fn(state.model, valid_loader, stage_run, config)
        if state.ema is not None:
            metrics["valid_ema"] = valid_fn(state.ema.model, valid_loader, stage_run, config)
        ranked = metrics["valid" if state.ema is None else "valid_ema"]
        score = main_score(ranked, config.main_metric)
        step = epoch * len(train_loader)
        state.scheduler.end_epoch(score)
        is_over = state.stopping.update(score) and epoch < stage.epochs
        stage_run.log_epoch(epoch, step, metrics, score, is_over=is_over)
        checkpoint = stage_run.make_checkpoint(epoch, step, metrics, ends_stage=is_over)
        checkpoints.process(score=score, epoch=epoch, checkpoint=checkpoint)
        stage_run.raise_if_preempted()  # by a signal during validation
        if is_over:
            break
    checkpoints.wait()  # they are written in the background
    return checkpoints


def build_state(
    model: nn.Module, stage: Stage, steps_per_epoch: int, device: torch.device, config: Config
) -> TrainState:
    """Build everything that changes while a stage trains."""
    optimizer = build_optimizer(model, stage, config)
    return TrainState(
        model=wrap_model(
            model,
            device,
            data_parallel=config.data_parallel,
            compiled=config.compile,
            find_unused_parameters=config.find_unused_parameters,
            shards=config.shards,
        ),
        optimizer=optimizer,
        scheduler=make_schedule(optimizer, stage, steps_per_epoch, minimize=config.minimize_metric),
        scaler=make_scaler(device, config.precision),
        ema=None if config.ema_decay is None else EMA(model, config.ema_decay),
        stopping=EarlyStopping(config.patience, config.min_delta, minimize=config.minimize_metric),
        frozen=stage.freeze,
    )


def build_optimizer(model: nn.Module, stage: Stage, config: Config) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters. An optimizer without `fused` works too."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=0.9, nesterov=True, fused=True)
    # fused: one pass over all weights, 8 ms a step instead of 30 to 50 (resnet18 on 2 cores, torch 2.15).
    return torch.optim.AdamW(groups, lr=stage.lr, fused=True)


def train_fn(state: TrainState, batches: EpochBatches, run: StepLogger, config: Config) -> dict[str, float]:
    """Train for one epoch and return the mean of each metric over the samples."""
    model = state.model
    criterion = prepare_criterion(task.build_criterion(config.label_smoothing, batches.class_weights), run)
    metrics = MeanMetrics(task.summarize)
    train_mode(model, state.frozen)
    state.buffers.save()  # batch norm statistics, which a skipped step restores
    for batch in run.track(batches, metrics):
        with accumulate(model, batch):
            with autocast(run.device, config.precision):
                logits = model(normalize(batch.images))  # (N, classes, ...)
                loss = criterion(logits, batch.targets)
            # The scaled losses of all micro-batches and ranks add up to the mean over the samples of the step.
            state.scaler.scale(batch.scale_loss(loss)).backward()
        metrics.update(len(batch.targets), loss=loss, **task.batch_metrics(logits.detach(), batch.targets))
        if batch.ends_step:
            # A step whose gradient is not finite is skipped.
            norm = optimizer_step(state.optimizer, state.scaler, config.clip_norm, state.buffers)
            run.log_step(state.scheduler.learning_rate(), norm)
            state.scheduler.step()
            if state.ema is not None:
                state.ema.update(model)
    return metrics.compute()


def valid_fn(model: nn.Module, loader: EvalLoader, run: StepLogger, config: Config) -> dict[str, float]:
    """Return the metrics of the validation split; every sample counts once."""
    criterion = prepare_criterion(task.build_criterion(), run)
    metrics = MeanMetrics(task.summarize, loader.classes)
    outputs = PredictionCollector(task.SCORES, (config.main_metric, *config.scores), loader.classes)
    with eval_mode(model) as network, autocast(run.device, config.precision):
        for images, targets in loader:
            logits = network(normalize(images))  # (N, classes, ...)
            metrics.update(len(targets), loss=criterion(logits, targets), **task.batch_metrics(logits, targets))
            if outputs.functions:
                outputs.add(task.to_predictions(logits.cpu().double()), targets)
    return metrics.compute(expected_count=loader.size) | outputs.score()


if __name__ == "__main__":
    run_command(main, Config)
