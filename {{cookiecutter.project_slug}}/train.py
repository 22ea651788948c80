"""Train a model on one fold of the data. Read from top to bottom; everything here is yours to change.

    scripts/train_device.sh --logdir logs/first --stages.0.epochs 3
    scripts/train_device.sh --config logs/first/config.json --logdir logs/again

The parts that one can only get wrong (random streams, shards, accumulation, checkpoints, process groups) are in
batteries/; what is learned, and from what, is in experiment/. One process is the same program as eight.
Relative paths count from the folder that holds this file when you use scripts/.
"""

import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends them without a traceback

import torch
from torch import nn

from batteries.checkpoints import CheckpointManager, load_weights
from batteries.cli import run_command
from batteries.data import Epoch, EvalLoader, TrainLoader
from batteries.devices import start_process
from batteries.distributed import first_on_each_machine
from batteries.errors import BadInput
from batteries.knobs import Count, NotNegative, Positive, Seed, Share, check_knobs
from batteries.logdirs import check_stages
from batteries.metrics import Averages, Outputs, check_metrics
from batteries.parallel import accumulate, check_batchnorm, evaluation, place_model, share_model
from batteries.randomness import Stream, random_stream, seed_all
from batteries.resume import fingerprint
from batteries.runs import Run
from batteries.schedules import Schedule, make_schedule, print_schedule
from batteries.sheets import sample_sheet
from batteries.splits import Split, SplitFile, check_files
from batteries.state import TrainState
from batteries.steps import Precision, autocast, make_scaler, take_step
from batteries.stopping import EarlyStopping
from batteries.trackers import Tracker, default_trackers
from batteries.weights import EMA, decay_groups, freeze, train_mode
from experiment.augmentations import batch_transform, normalize, train_transform, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_criterion, build_model, share_right, to_probabilities
from experiment.splits import make_folds

# Scores of the whole validation split, from targets (N,) and probabilities (N, classes); a new one is a new line here.
SCORES = {
    "balanced_accuracy": lambda sk, targets, p: sk.balanced_accuracy_score(targets, p.argmax(1)),
    "macro_f1": lambda sk, targets, p: sk.f1_score(targets, p.argmax(1), average="macro"),
    "log_loss": lambda sk, targets, p: sk.log_loss(targets, p, labels=range(p.shape[1])),
    "roc_auc": lambda sk, targets, p: sk.roc_auc_score(targets, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"),
}


@dataclass(frozen=True)
class Stage:
    """A phase of the run, with its own epochs, learning rate and checkpoints."""

    name: str  # its folder in the logdir
    epochs: Count  # passes over the train split
    lr: Positive  # the highest learning rate of the stage
    schedule: Schedule = "one-cycle"  # how the learning rate goes; see it by --show-schedule
    warmup_epochs: NotNegative = 0  # a rise in a line before cosine, multi-step or constant
    freeze: tuple[str, ...] = ()  # modules that do not learn, such as layer1; their batch norm stands still too
    image_size: Count | None = None  # height and width in pixels; without it as experiment/augmentations.py has them
    start: Literal["best", "last"] = "best"  # which weights of the stage before it begins with


@dataclass(frozen=True)
class Config:
    """Train a model. `--config logs/x/config.json` repeats a run; flags beside it win."""

    # The recipe: what you change most.
    stages: tuple[Stage, ...] = (Stage("stage0", epochs=6, lr=3e-3), Stage("stage1", epochs=3, lr=3e-4))
    batch_size: Count = 32  # samples per optimizer step, over all ranks and micro-batches; small, for many steps
    accumulation_steps: Count = 1  # micro-batches per step; more of them need less memory
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has Nesterov momentum 0.9; it wants a larger lr, such as 0.1
    weight_decay: NotNegative = 0.05  # on matrices and kernels alone; as for small networks (Loshchilov, Hutter 2019)
    clip_norm: Positive | None = None  # the longest gradient, as one vector; 1 calms transformers
    label_smoothing: Share = 0.0  # share of the target given to all classes alike, in training alone; 0.1 is usual
    mixup: NotNegative = 0.0  # alpha of mixup, 0 is without it; mixing wants more epochs
    cutmix: NotNegative = 0.0  # alpha of cutmix, 0 is without it; with both, each mixes half of the steps
    ema_decay: Share | None = None  # validates an average of the weights too, and ranks by it; 0.99 to 0.9999
    patience: Count | None = None  # epochs without a better score that end a stage; without it none does
    min_delta: NotNegative = 0.0  # how much better counts for --patience
    main_metric: str = "accuracy"  # the validation metric that ranks checkpoints: loss, accuracy or one of SCORES
    minimize_metric: bool = False  # whether less of it is better
    scores: tuple[str, ...] = ()  # more metrics of SCORES to log
    save_n_best: Count = 3  # checkpoints kept per stage beside the two newest; averaging wants several

    # The data.
    data_dir: Path = Path("data")  # where data sets that are files are kept
    split_file: Path = Path("splits/default.csv")  # which samples train, validate and test; made where there is none
    fold: int = 0  # which fold validates, from 0; the others train. How many there are is for split.py --num-folds
    seed: Seed = 0  # of everything random but the split, 0 to 2^32 - 1
    drop_last: bool = True  # leave out an epoch's short last step: few samples make noisy steps
    valid_batch_size: Count = 256  # samples that one rank validates at once; changes memory, speed and the last digits
    num_workers: int | None = None  # loader processes per rank; by default from the machine, 0 on a CPU
    limit_batches: Count | None = None  # at most so many steps and validation batches an epoch: a smoke run

    # The machine.
    logdir: Path = Path("logs/baseline")  # the run's folder; one that holds a run is refused without --resume
    resume: bool = False  # go on with the run in the logdir, bit for bit; start it where there is none
    init_from: Path | None = None  # a checkpoint, whose weights a new run starts from instead of random ones
    pretrained: str | None = None  # the same from torchvision (ResNet18_Weights.DEFAULT) or a file, as far as it fits
    checkpoint_every_minutes: NotNegative | None = 10  # between checkpoints within an epoch, beside the one at its end
    checkpoint_every_steps: Count | None = None  # the same, counted in steps
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto takes a GPU where there is one
    data_parallel: bool = False  # DataParallel over all visible GPUs, in one process; DDP is faster and has SyncBN
    sync_batchnorm: bool = True  # under DDP, batch norm over all ranks; without it each rank's own few samples
    precision: Precision = "fp32"  # bf16 and fp16 halve memory and time on GPUs that have them; bf16 needs no scaling
    tf32: bool = True  # fp32 products with 10 bits of mantissa on NVIDIA GPUs: several times faster
    channels_last: bool = False  # the memory format that tensor cores like for convolutions
    compile: bool = False  # torch.compile: faster steps after a minute or more of compiling
    deterministic: bool = True  # same bits again on the same machine; without it cudnn picks the fastest kernels
    sharing_strategy: Literal["file_system", "file_descriptor"] = "file_system"  # file_descriptor runs out of files
    show_warnings: bool = False  # python warnings of libraries, quiet by default
    show_schedule: bool = False  # print the learning rate of each epoch, and end
    profile: bool = False  # write a trace of a few steps to logdir/profile
    tracker: tuple[Tracker, ...] = field(default_factory=default_trackers)  # where curves go beside metrics.jsonl
    report: bool = True  # at the end a page to look at, logdir/report.html: curves, confusions, worst mistakes
    quiet: bool = False  # nothing on the terminal but warnings; train.log has it all

    def __post_init__(self) -> None:
        """Refuse what cannot be meant. What needs the data or the machine is checked where they are known."""
        check_knobs(self)
        check_stages(self.stages)
        check_metrics((self.main_metric, *self.scores), SCORES, self.main_metric, minimize=self.minimize_metric)
        if self.init_from is not None and self.pretrained is not None:
            raise BadInput("--init-from and --pretrained both say where weights come from; give one.")
        if self.min_delta and self.patience is None:
            raise BadInput(f"--min-delta {self.min_delta} is for --patience; give that too, or leave it out.")


# What may be given otherwise to a run that is resumed: it changes no number.
MAY_CHANGE = (
    *("data_dir", "split_file", "num_workers", "save_n_best", "logdir", "init_from", "pretrained", "device"),
    *("checkpoint_every_minutes", "checkpoint_every_steps", "sharing_strategy", "show_warnings", "show_schedule"),
    *("profile", "tracker", "report", "quiet"),
)


def main(config: Config) -> float:
    """Train all stages of a run; the best validation score over them."""
    with start_process(config) as device:
        seed_all(config.seed)
        dataset = first_on_each_machine(lambda: load_dataset(config.data_dir))
        split_file = SplitFile(config.split_file, dataset, make_folds)
        split = split_file.select(config.fold)
        check_files(dataset, split)
        train_loader, _ = make_loaders(config.stages[0], dataset, split, device, config)
        if config.show_schedule:
            return print_schedule(config.stages, len(train_loader))
        model_args = {"num_classes": len(dataset.classes)}
        with random_stream(config.seed, Stream.WEIGHTS):
            model = build_model(**model_args)
        check_batchnorm(model, train_loader, synchronised=config.sync_batchnorm)
        for number, stage in reversed([*enumerate(config.stages)]):  # to refuse unknown names; the first is in force
            freeze(model, stage.freeze, f"--stages.{number}.freeze")
        model = place_model(model, device, sync_batchnorm=config.sync_batchnorm, channels_last=config.channels_last)
        data = fingerprint(dataset.fingerprint(), *split)
        run = Run(
            *(config.logdir, config, device, model),
            model_args=model_args,
            data=data,
            split=split_file.describe(),
            may_change=MAY_CHANGE,
        )
        run.load_first_weights()  # its own checkpoint's, then --init-from's or --pretrained's, then those of the seed
        split_file.write()
        with run:
            run.say_start({name: len(part) for name, part in split._asdict().items()})
            run.log_image("samples", lambda: sample_sheet(train_loader, normalize))
            stages: list[CheckpointManager] = []
            for number, stage in enumerate(config.stages):
                if stages and not run.has_begun(number):
                    load_weights(stages[-1].path_of(stage.start), model)
                loaders = make_loaders(stage, dataset, split, device, config)
                stages.append(train_stage(number, model, *loaders, run, config))
            return run.finish(stages)


def make_loaders(
    stage: Stage, dataset: Any, split: Split, device: torch.device, config: Config
) -> tuple[TrainLoader, EvalLoader]:
    """The batches that a stage trains on, and those that it validates on."""
    machine: dict[str, Any] = {"limit_batches": config.limit_batches, "num_workers": config.num_workers}
    train_loader = TrainLoader(
        *(dataset, split.train, train_transform(stage.image_size), device),
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        drop_last=config.drop_last,
        mixer=batch_transform(len(dataset.classes), config.mixup, config.cutmix),
        **machine,
    )
    transform = valid_transform(stage.image_size)
    return train_loader, EvalLoader(
        dataset, split.valid, transform, device, batch_size=config.valid_batch_size, **machine
    )


def train_stage(
    number: int, model: nn.Module, train_loader: TrainLoader, valid_loader: EvalLoader, run: Run, config: Config
) -> CheckpointManager:
    """Train stage `number` (from 0) and keep its checkpoints in its folder."""
    stage = config.stages[number]
    freeze(model, stage.freeze)
    optimizer = build_optimizer(model, stage, config)
    state = TrainState(
        share_model(model, run.device, data_parallel=config.data_parallel, compiled=config.compile),
        optimizer,
        make_schedule(optimizer, stage, len(train_loader), minimize=config.minimize_metric),
        make_scaler(run.device, config.precision),
        None if config.ema_decay is None else EMA(model, config.ema_decay),
        EarlyStopping(config.patience, config.min_delta, minimize=config.minimize_metric),
        stage.freeze,
    )
    checkpoints = CheckpointManager(
        run.logdir / stage.name, config.main_metric, config.minimize_metric, config.save_n_best, run.writer
    )
    start = run.begin_stage(number, state, checkpoints)
    for epoch in range(start.epoch, stage.epochs + 1):
        batches = train_loader.epoch(number, epoch, start.step if epoch == start.epoch else 0)
        metrics = {"train": train_fn(state, batches, run, config)}
        metrics["valid"] = valid_fn(state.model, valid_loader, run, config)
        if state.ema is not None:
            metrics["valid_ema"] = valid_fn(state.ema.model, valid_loader, run, config)
        scored = metrics["valid" if state.ema is None else "valid_ema"]
        # Outputs that are NaN have an accuracy all the same; their epoch is never the best.
        score = scored[config.main_metric] if math.isfinite(scored["loss"]) else math.nan
        step = epoch * len(train_loader)
        state.scheduler.end_epoch(score)
        is_over = state.stopping.update(score) and epoch < stage.epochs
        run.log_epoch(epoch, step, metrics, score, is_over)
        checkpoint = run.make_checkpoint(epoch, step, metrics, ends_stage=is_over)
        checkpoints.process(score=score, epoch=epoch, checkpoint=checkpoint)
        run.stop_if_asked()  # by a signal that came in validation
        if is_over:
            break
    checkpoints.wait()  # they are written in the background
    return checkpoints


def build_optimizer(model: nn.Module, stage: Stage, config: Config) -> torch.optim.Optimizer:
    """What steps the weights that learn in this stage."""
    groups = decay_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=0.9, nesterov=True, fused=True)
    # fused: one pass over all weights, 8 ms a step instead of 30 to 50 (resnet18 on 2 cores, torch 2.15).
    return torch.optim.AdamW(groups, lr=stage.lr, fused=True)


def train_fn(state: TrainState, batches: Epoch, run: Run, config: Config) -> dict[str, float]:
    """One pass over the train split; the mean of each metric over its samples, as they were seen."""
    model, criterion = state.model, build_criterion(config.label_smoothing)
    train_mode(model, state.frozen)
    state.buffers.keep()
    metrics = Averages()
    for batch in run.track(batches, metrics):
        with accumulate(model, batch):
            with autocast(run.device, config.precision):
                logits = model(normalize(batch.images))  # (N, classes)
                loss = criterion(logits, batch.targets)
            state.scaler.scale(batch.weigh(loss)).backward()  # micro-batches add up to the mean over the whole step
        metrics.update(len(batch.targets), loss=loss, accuracy=share_right(logits, batch.targets))
        if batch.ends_step:
            # No step where a gradient is not finite.
            norm = take_step(state.optimizer, state.scaler, config.clip_norm, state.buffers)
            run.log_step(state.scheduler.learning_rate(), norm)
            state.scheduler.step()
            if state.ema is not None:
                state.ema.update(model)
    return metrics.compute()


def valid_fn(model: nn.Module, loader: EvalLoader, run: Run, config: Config) -> dict[str, float]:
    """The metrics over the validation split, every sample once."""
    criterion = build_criterion()
    metrics, outputs = Averages(), Outputs()
    scores = [name for name in SCORES if name in (config.main_metric, *config.scores)]
    with evaluation(model) as network, autocast(run.device, config.precision):
        for images, targets in loader:
            logits = network(normalize(images))  # (N, classes)
            metrics.update(len(targets), loss=criterion(logits, targets), accuracy=share_right(logits, targets))
            if scores:
                outputs.add(to_probabilities(logits.cpu().double()), targets)
    return metrics.compute(expected_count=loader.size) | outputs.score({name: SCORES[name] for name in scores})


if __name__ == "__main__":
    run_command(main, Config)
