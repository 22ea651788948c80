"""Check data, model and machine before a long run, in about a minute.

    python tools/check.py                                       # checks what `train.py` would run
    python tools/check.py --config logs/x/config.json --batch-size 256

It takes the options of train.py and calls the same functions. It leaves nothing behind: no logdir, no split file.
To add a check, write a function from CheckContext to CheckResult and add it to CHECKS.
Exit code: 0 if no check fails, with or without warnings; 1 if one fails; 2 for invalid input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import nn

from batteries.checkpoint import io as checkpoint_io
from batteries.core.command_line import run_command
from batteries.core.config_io import to_json
from batteries.core.memory import peak_memory
from batteries.core.seeding import Stream, preserved_random_state, random_stream, seed_all
from batteries.core.validators import Count
from batteries.data.dataset import Dataset
from batteries.data.image_decoding import decode_file
from batteries.data.image_stats import ImageSignature
from batteries.data.loaders import Batch, EvalLoader, TrainLoader
from batteries.data.packing import lossless_side, pack_image
from batteries.data.packs import PackRecord, is_pack
from batteries.data.splits import Split, SplitFile
from batteries.data.workers import choose_num_workers
from batteries.distributed.process_group import require_single_process
from batteries.distributed.unwrap import unwrap_model
from batteries.models.options import model_arguments
from batteries.preflight import data_checks, machine_checks, model_checks, target_checks
from batteries.preflight.machine_checks import LoadingTimes, Speed, measure_intervals
from batteries.preflight.results import CheckResult, raise_if_failed, run_checks
from batteries.training.metrics import check_main_metric
from batteries.training.parameters import check_module_names, freeze
from batteries.training.pretrained import load_pretrained
from batteries.training.setup import preserved_settings, setup_training
from batteries.training.state import SilentLogger, TrainState
from batteries.training.wrap import check_batchnorm, prepare_model
from experiment import augmentations, task
from experiment.augmentations import normalize, train_transform, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.splits import make_folds
from train import Config, Stage, build_state, make_loaders, train_fn, valid_fn

SMALL_BATCH = 8  # samples of a step if its speed and size do not matter
GRADIENT_STEPS = 10  # enough to see most layers that are skipped at random
NORMALIZATION_SAMPLES = 512
MAX_TIMED_STEPS = 20
TIMED_SAMPLES = 16  # decoded photographs of this number fit into memory


@dataclass(frozen=True)
class Options(Config):
    """Check what a run with these options would do. `--config logs/x/config.json` takes the options of a run."""

    samples: Count = 2000  # images to open and compare; chosen at random if there are more
    overfit_steps: Count = 60  # steps in which one small batch must be learned


class RepeatedStep(list[Batch]):
    """The micro-batches of one step, in place of those of an epoch."""

    class_weights = None


@dataclass
class CheckContext:
    """What the checks share: the objects that train.py has before its first step.

    Attributes:
        options: The options of train.py and of the checks.
        device: The device of this process.
        dataset: The data set.
        split_file: The split file, or the split that would be written.
        split: The indices of the fold.
        logger: A StepLogger that shows and saves nothing.
    """

    options: Options
    device: torch.device
    dataset: Dataset
    split_file: SplitFile
    split: Split
    logger: SilentLogger

    @property
    def first_stage(self) -> Stage:
        """The first stage."""
        return self.options.stages[0]

    @property
    def plain_options(self) -> Options:
        """The options with the loss as the only metric, and without the short last step."""
        return replace(self.options, main_metric="loss", minimize_metric=True, scores=(), drop_last=True)

    @property
    def small_options(self) -> Options:
        """The options for two small steps without worker processes."""
        size = min(SMALL_BATCH, self.options.batch_size, len(self.split.train))
        return replace(
            self.plain_options,
            batch_size=size,
            valid_batch_size=size,
            accumulation_steps=1,
            shards=None,
            limit_batches=2,
            num_workers=0,
        )

    @cached_property
    def opened(self) -> tuple[np.ndarray, list[ImageSignature | str | None]]:
        """The indices of the samples that are opened, and the signature or the error of each."""
        everything = np.concatenate(self.split)
        indices = data_checks.choose_samples(everything, self.options.samples, self.options.seed)
        return indices, data_checks.open_samples(self.dataset, indices)

    @cached_property
    def speeds(self) -> dict[str, Speed]:
        """The speed of each stage under its name, measured once for stages that do not differ in speed."""
        measured: dict[tuple[Any, ...], Speed] = {}
        for stage in self.options.stages:
            key = stage.image_size, stage.freeze
            if key not in measured:
                measured[key] = self._measure(
                    replace(self.first_stage, image_size=stage.image_size, freeze=stage.freeze)
                )
        return {stage.name: measured[stage.image_size, stage.freeze] for stage in self.options.stages}

    def loaders(self, stage: Stage, options: Config) -> tuple[TrainLoader, EvalLoader]:
        """Build the loaders as train.py does."""
        return make_loaders(stage, self.dataset, self.split, self.device, options)

    def make_model(self, stream: int = 0) -> nn.Module:
        """Build the model with its initial weights; another `stream` gives other random weights."""
        options = self.options
        key = (options.seed, stream, Stream.WEIGHTS) if stream else (options.seed, Stream.WEIGHTS)
        with random_stream(*key):
            classes = len(self.dataset.classes)
            model = build_model(**model_arguments(build_model, classes, options.model, options.model_args))
        model = prepare_model(model, self.device, channels_last=options.channels_last)
        if options.init_from is not None:
            checkpoint_io.load_weights(options.init_from, model)
        if options.pretrained is not None:
            load_pretrained(model, options.pretrained)
        return model

    def make_state(self, stage: Stage, steps: int, stream: int = 0) -> TrainState:
        """Build the state of a stage with `steps` steps per epoch, without --compile, which takes long."""
        model = self.make_model(stream)
        freeze(model, stage.freeze)
        return build_state(model, stage, steps, self.device, replace(self.options, compile=False))

    def make_checkpoint(self, state: TrainState) -> dict[str, Any]:
        """Build the checkpoint of a state."""
        return checkpoint_io.make_checkpoint(
            stage=self.first_stage.name,
            epoch=1,
            model=state.model,
            optimizer=state.optimizer,
            scheduler=state.scheduler,
            experiment_args=to_json(self.options),
            extra=state.extra(),
        )

    def _measure(self, stage: Stage) -> Speed:
        """Measure loading, training on loaded batches, and validation."""
        plain = self.plain_options
        limit = self.options.limit_batches or MAX_TIMED_STEPS
        train_loader, _ = self.loaders(stage, replace(plain, limit_batches=min(MAX_TIMED_STEPS, limit)))
        _, valid_loader = self.loaders(stage, replace(plain, limit_batches=min(2, limit)))
        state = self.make_state(stage, len(train_loader))
        first_step = RepeatedStep()

        def load() -> Iterator[None]:
            for batch in train_loader.epoch(0, 1):
                if not first_step or not first_step[-1].ends_step:
                    first_step.append(batch)
                if batch.ends_step:
                    yield

        def train() -> Iterator[object]:
            for _ in range(MAX_TIMED_STEPS):
                yield train_fn(state, first_step, self.logger, plain)  # type: ignore[arg-type]

        def validate() -> Iterator[object]:
            for _ in range(3):
                yield valid_fn(state.model, valid_loader, self.logger, plain)

        loading = mean(measure_intervals(load()))  # workers deliver several batches at once
        step = median(measure_intervals(train()))
        validation = median(measure_intervals(validate()))
        validation *= self.loaders(stage, self.options)[1].size / valid_loader.size
        workers = self.options.num_workers
        return Speed(loading, step, validation, choose_num_workers(self.device) if workers is None else workers)

    def measure_loading(self, stage_name: str) -> LoadingTimes:
        """Measure the parts of loading in this process, on a few samples of a stage."""
        [size] = [stage.image_size for stage in self.options.stages if stage.name == stage_name]
        transform = train_transform(size) or (lambda *sample: sample)
        indices = data_checks.choose_samples(self.split.train, TIMED_SAMPLES, self.options.seed).tolist()
        samples: list[Any] = []
        with preserved_random_state():
            reading = mean(measure_intervals(samples.append(self.dataset[index]) for index in indices))
            transforming = mean(measure_intervals(transform(*sample) for sample in samples))
        files: Any = self.dataset
        if not hasattr(files, "read_image") or not hasattr(files, "data_dir") or is_pack(files.data_dir):
            return LoadingTimes(reading, transforming)
        side = lossless_side(size or getattr(augmentations, "SIZE", 224), getattr(augmentations, "SCALE", (0.25, 1.0)))
        record = PackRecord("jpeg", side, 90, "", "", "", {})
        packed = [pack_image(files, index, record) for index in indices[: len(samples)]]
        packed_reading = mean(measure_intervals(decode_file(data, "RGB") for data in packed if isinstance(data, bytes)))
        return LoadingTimes(reading, transforming, packed_reading)


def make_context(options: Options, device: torch.device) -> CheckContext:
    """Load the data and the split. Raises UserError for options and files that train.py would reject."""
    dataset = load_dataset(options.data_dir)
    split_file = SplitFile(options.split_file, dataset, make_folds)
    split = split_file.select_unchecked(options.fold)
    context = CheckContext(options, device, dataset, split_file, split, SilentLogger(device))
    model = context.make_model()
    for stage in options.stages:
        train_loader, _ = context.loaders(stage, options)
        check_batchnorm(model, train_loader, synchronised=options.sync_batchnorm)
        task.build_criterion(options.label_smoothing, train_loader.class_weights)  # rejects what the task does not have
    check_module_names(model, options.stages)

    def validate(small: Options) -> dict[str, float]:
        _, valid_loader = context.loaders(context.first_stage, small)
        return valid_fn(model, valid_loader, context.logger, small)

    check_main_metric(options, task, validate)
    return context


def check_samples_load(context: CheckContext) -> CheckResult:
    """Check that every sample, or a random subset of them, can be read."""
    return data_checks.check_samples_load(context.dataset, context.split, *context.opened)


def check_class_counts(context: CheckContext) -> CheckResult:
    """Check how many samples of each class or label each split has, or the range of its numbers."""
    return target_checks.check_class_counts(context.split_file, context.options.fold, target_constants())


def target_constants() -> target_checks.TargetConstants | None:
    """Return TARGET_MEAN and TARGET_STD that experiment/task.py uses, if there are any."""
    mean = getattr(task, "TARGET_MEAN", None)
    std = getattr(task, "TARGET_STD", None)
    return None if mean is None or std is None else target_checks.TargetConstants(mean, std)


def check_duplicates(context: CheckContext) -> CheckResult:
    """Check for images that are in two splits."""
    return data_checks.check_duplicates(context.dataset, context.split, *context.opened)


def check_normalization(context: CheckContext) -> CheckResult:
    """Check the values of the train split, without augmentation, as the model gets them."""
    indices = data_checks.choose_samples(context.split.train, NORMALIZATION_SAMPLES, context.options.seed)
    transform = valid_transform(context.first_stage.image_size)
    loader = EvalLoader(context.dataset, indices, transform, context.device, batch_size=64)
    return data_checks.check_normalization(normalize(images) for images, _ in loader)


def check_overfit_one_batch(context: CheckContext) -> CheckResult:
    """Check that the same few samples are learned, without augmentation and mixing."""
    steps = context.options.overfit_steps
    options = replace(context.options, label_smoothing=0.0)
    stage = replace(context.first_stage, schedule="constant", epochs=1, warmup_epochs=0.2)
    size = context.small_options.batch_size
    indices = target_checks.choose_balanced(context.dataset, context.split.train, size)
    loader = TrainLoader(
        context.dataset,
        indices,
        valid_transform(stage.image_size),
        context.device,
        seed=context.options.seed,
        batch_size=len(indices),
    )
    state = context.make_state(stage, steps)

    def losses() -> Iterator[float]:
        for number in range(1, steps + 1):
            yield train_fn(state, loader.epoch(0, number), context.logger, options)["loss"]

    may_be_trained = context.options.init_from is not None
    return model_checks.check_overfit_one_batch(losses(), len(indices), stage.lr, pretrained=may_be_trained)


def check_gradients(context: CheckContext) -> CheckResult:
    """Check that every parameter that any stage trains gets a gradient, in small steps with nothing frozen."""
    options = replace(context.small_options, limit_batches=1)
    train_loader, _ = context.loaders(context.first_stage, options)
    state = context.make_state(replace(context.first_stage, freeze=()), GRADIENT_STEPS)
    trainable: set[str] = set()
    for stage in context.options.stages:
        freeze(state.model, stage.freeze)
        trainable |= {name for name, value in unwrap_model(state.model).named_parameters() if value.requires_grad}
    freeze(state.model, ())

    def steps() -> Iterator[object]:
        for number in range(1, GRADIENT_STEPS + 1):
            yield train_fn(state, train_loader.epoch(0, number), context.logger, options)

    return model_checks.check_gradients(
        state.model,
        trainable,
        steps(),
        scaled=options.precision == "fp16",
        find_unused_parameters=options.find_unused_parameters,
    )


def check_shards(context: CheckContext) -> CheckResult:
    """Check that shards have enough samples for the statistics of batch norm."""
    train_loader, _ = context.loaders(context.first_stage, context.options)
    return model_checks.check_shards(context.make_model(), train_loader)


def check_checkpoint_roundtrip(context: CheckContext) -> CheckResult:
    """Check that a saved state, loaded into another model, continues bit for bit."""
    train_loader, valid_loader = context.loaders(context.first_stage, context.small_options)

    def make_state(stream: int) -> TrainState:
        return context.make_state(context.first_stage, len(train_loader), stream)

    def train_and_validate(state: TrainState, epoch: int) -> Any:
        train = train_fn(state, train_loader.epoch(0, epoch), context.logger, context.small_options)
        return {"train": train, "valid": valid_fn(state.model, valid_loader, context.logger, context.small_options)}

    is_repeatable = context.options.deterministic or context.device.type == "cpu"
    return model_checks.check_checkpoint_roundtrip(
        context.options.logdir,
        make_state,
        context.make_checkpoint,
        train_and_validate if is_repeatable else None,
    )


def check_logdir(context: CheckContext) -> CheckResult:
    """Check that train.py would accept the logdir."""
    return machine_checks.check_logdir_is_free(context.options.logdir, resume=context.options.resume)


def check_disk_space(context: CheckContext) -> CheckResult:
    """Check that the checkpoints of all stages fit on the disk."""
    options = context.options
    within_epochs = options.checkpoint_every_minutes is not None or options.checkpoint_every_steps is not None
    sizes = [
        machine_checks.count_state_bytes(context.make_state(stage, 1), context.make_checkpoint)
        for stage in options.stages
    ]
    counts = [
        machine_checks.kept_checkpoints(stage.epochs, options.save_n_best, within_epochs=within_epochs)
        for stage in options.stages
    ]
    return machine_checks.check_disk_space(options.logdir, sizes, counts)


def check_processes(context: CheckContext) -> CheckResult:
    """Check that the processes of scripts/train_ddp.sh can communicate."""
    options = context.options
    return machine_checks.check_processes(
        context.device, options.accumulation_steps, options.batch_size, options.shards
    )


def check_loader_throughput(context: CheckContext) -> CheckResult:
    """Compare the speed of the loader with that of the model."""
    speeds = dict(reversed(context.speeds.items()))
    return machine_checks.check_loader_throughput(speeds, context.options.batch_size, context.measure_loading)


def check_run_time(context: CheckContext) -> CheckResult:
    """Estimate the time of the whole run; report the memory used so far."""
    options = context.options
    lengths = [
        machine_checks.StageLength(
            epochs=stage.epochs,
            steps=len(context.loaders(stage, options)[0]),
            validations=1 if options.ema_decay is None else 2,
            speed=context.speeds[stage.name],
        )
        for stage in options.stages
    ]
    memory = peak_memory(context.device)
    result = machine_checks.estimate_run_time(lengths, memory, may_stop_early=options.patience is not None)
    if options.compile:
        result = result._replace(details=f"{result.details}; measured without --compile")
    return result


CHECKS: list[tuple[str, Callable[[CheckContext], CheckResult]]] = [
    ("samples load", check_samples_load),
    ("class counts", check_class_counts),
    ("duplicates", check_duplicates),
    ("normalization", check_normalization),
    ("one batch", check_overfit_one_batch),
    ("gradients", check_gradients),
    ("shards", check_shards),
    ("checkpoint", check_checkpoint_roundtrip),
    ("logdir", check_logdir),
    ("disk space", check_disk_space),
    ("processes", check_processes),
    ("loader", check_loader_throughput),
    ("run time", check_run_time),
]


def main(options: Options) -> None:
    """Run all checks. Raises RunError if one fails."""
    require_single_process("check.py")
    with preserved_settings(), setup_training(options) as device:
        seed_all(options.seed)
        context = make_context(options, device)
        checks = {name: partial(check, context) for name, check in CHECKS}
        if options.shards is None:
            del checks["shards"]
        results = run_checks(checks)
    raise_if_failed(results)


if __name__ == "__main__":
    run_command(main, Options)
