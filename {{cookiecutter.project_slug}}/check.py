"""Everything that can be wrong before a long run, tried in about a minute.

    python check.py                                       # what `train.py` would run into
    python check.py --config logs/x/config.json --batch-size 256

It takes the flags of train.py, and goes through the same functions. It leaves nothing behind: no logdir, no split file.
Exit code 0 where nothing fails, warnings or not, 1 where something does, 2 for bad input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import nn

from batteries import (
    EvalLoader,
    SplitFile,
    Stream,
    TrainLoader,
    check_batchnorm,
    data_checks,
    machine_checks,
    make_checkpoint,
    model_checks,
    place_model,
    random_stream,
    run_command,
    seed_all,
    start_process,
)
from batteries.checkpoints import load_weights
from batteries.checks import Row, refuse_failed, try_all
from batteries.cli import to_json
from batteries.data import Batch, choose_num_workers
from batteries.devices import preserved_settings
from batteries.distributed import refuse_launcher
from batteries.knobs import Count
from batteries.machine_checks import Speed, seconds_each
from batteries.parallel import bare, share_model
from batteries.pixels import Look
from batteries.records import peak_memory
from batteries.schedules import make_schedule
from batteries.state import TrainState
from batteries.steps import make_scaler
from batteries.stopping import EarlyStopping
from batteries.weights import EMA, freeze, load_pretrained
from experiment.augmentations import normalize, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.splits import make_folds
from train import Config, Stage, build_optimizer, make_loaders, train_fn, valid_fn

FEW = 8  # samples of a step whose speed and size do not matter
NORMALISED = 512  # samples whose values are looked at
STEPS_TIMED = 20  # at most


@dataclass(frozen=True)
class Options(Config):
    """Try what a run with these flags would meet. `--config logs/x/config.json` takes those of a run."""

    samples: Count = 2000  # images to open and compare; where there are more, so many by chance
    overfit_steps: Count = 60  # in which a few samples have to be learned by heart


def main(options: Options) -> None:
    """Try everything. Raises RunFailed where something fails."""
    refuse_launcher("check.py")
    with preserved_settings(), start_process(options) as device:
        seed_all(options.seed)
        rows = try_all(Bench(options, device).checks())
    refuse_failed(rows)


class Bench:
    """What train.py has before its first step, made as often as checks want it; each check is a method.

    Raises BadInput for flags and files that train.py would refuse.
    """

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.run: Any = model_checks.DryRun(device)
        self.dataset = load_dataset(options.data_dir)
        self.splits = SplitFile(options.split_file, self.dataset, make_folds)
        self.split = self.splits.cut(options.fold)
        self.first = options.stages[0]
        size = min(FEW, options.batch_size, len(self.split.train))
        plain: dict[str, Any] = {"main_metric": "loss", "minimize_metric": True, "scores": (), "drop_last": True}
        self.plain = replace(options, **plain)
        few: dict[str, Any] = {"accumulation_steps": 1, "limit_batches": 2, "num_workers": 0}
        self.few = replace(self.plain, **few, batch_size=size, valid_batch_size=size)
        self.measure = cache(self._measure)
        model = self.make_model()
        for number, stage in enumerate(options.stages):
            check_batchnorm(model, self.loaders(stage, options)[0], synchronised=options.sync_batchnorm)
            freeze(model, stage.freeze, f"--stages.{number}.freeze")

    def checks(self) -> dict[str, Callable[[], Row]]:
        """In the order in which they are tried."""
        return {
            "data opens": self.data_opens,
            "classes": self.classes,
            "duplicates": self.duplicates,
            "normalisation": self.normalisation,
            "one batch": self.one_batch,
            "gradients": self.gradients,
            "checkpoint": self.checkpoint,
            "logdir": self.logdir,
            "disk": self.disk,
            "processes": self.processes,
            "loader": self.loader,
            "whole run": self.whole_run,
        }

    def loaders(self, stage: Stage, options: Config) -> tuple[TrainLoader, EvalLoader]:
        """As train.py makes them."""
        return make_loaders(stage, self.dataset, self.split, self.device, options)

    def make_model(self, stream: int = 0) -> nn.Module:
        """With its first weights; the random ones are others for another `stream`."""
        options = self.options
        with random_stream(options.seed, *([stream] if stream else []), Stream.WEIGHTS):
            model = build_model(num_classes=len(self.dataset.classes))
        model = place_model(model, self.device, channels_last=options.channels_last)
        if options.init_from is not None:
            load_weights(options.init_from, model)
        if options.pretrained is not None:
            load_pretrained(model, options.pretrained)
        return model

    def make_state(self, stage: Stage, steps: int, stream: int = 0) -> TrainState:
        """What train_stage makes, for so many steps an epoch; without --compile, which takes its time."""
        options, model = self.options, self.make_model(stream)
        freeze(model, stage.freeze)
        optimizer = build_optimizer(model, stage, options)
        return TrainState(
            share_model(model, self.device, data_parallel=options.data_parallel),
            optimizer,
            make_schedule(optimizer, stage, steps, minimize=options.minimize_metric),
            make_scaler(self.device, options.precision),
            None if options.ema_decay is None else EMA(model, options.ema_decay),
            EarlyStopping(options.patience, options.min_delta, minimize=options.minimize_metric),
            stage.freeze,
        )

    def pack(self, state: TrainState) -> dict[str, Any]:
        """The checkpoint of `state`."""
        arguments = to_json(self.options)
        parts = state.model, state.optimizer, state.scheduler
        return make_checkpoint(self.first.name, 1, *parts, experiment_args=arguments, extra=state.extra())

    @cached_property
    def opened(self) -> tuple[np.ndarray, list[Look | str | None]]:
        """The samples that are looked at, by index, and what is kept of each."""
        indices = data_checks.choose_samples(np.concatenate(self.split), self.options.samples, self.options.seed)
        return indices, data_checks.open_samples(self.dataset, indices)

    def data_opens(self) -> Row:
        """Every file, or a sample of them."""
        return data_checks.data_opens(self.dataset, self.split, *self.opened)

    def classes(self) -> Row:
        """How many samples of each class each part has."""
        return data_checks.classes_are_there(self.splits, self.options.fold)

    def duplicates(self) -> Row:
        """Images in two parts."""
        return data_checks.no_duplicates(self.dataset, self.split, *self.opened)

    def normalisation(self) -> Row:
        """Values of the train split, without augmentation, as the model gets them."""
        indices = data_checks.choose_samples(self.split.train, NORMALISED, self.options.seed)
        transform = valid_transform(self.first.image_size)
        loader = EvalLoader(self.dataset, indices, transform, self.device, batch_size=64)
        return data_checks.values_are_normal(normalize(images) for images, _ in loader)

    def one_batch(self) -> Row:
        """The same few samples in each step, read anew, without augmentation and mixing."""
        steps, options = self.options.overfit_steps, replace(self.options, label_smoothing=0.0)
        stage = replace(self.first, schedule="constant", epochs=1, warmup_epochs=0.2)
        indices = data_checks.some_of_each_class(self.dataset, self.split.train, self.few.batch_size)
        samples = self.dataset, indices, valid_transform(stage.image_size), self.device
        loader = TrainLoader(*samples, seed=options.seed, batch_size=len(indices))
        state = self.make_state(stage, steps)
        epochs = (loader.epoch(0, number) for number in range(1, steps + 1))
        losses = (train_fn(state, epoch, self.run, options)["loss"] for epoch in epochs)
        return model_checks.learns_by_heart(losses, len(indices), stage.lr, knows=options.init_from is not None)

    def gradients(self) -> Row:
        """Small steps as in training, with nothing frozen: what learns in any stage has to be reached."""
        loader, _ = self.loaders(self.first, self.few)
        state = self.make_state(replace(self.first, freeze=()), len(loader))
        learning: set[str] = set()
        for stage in self.options.stages:
            freeze(state.model, stage.freeze)
            learning |= {name for name, value in bare(state.model).named_parameters() if value.requires_grad}
        freeze(state.model, ())
        batches, scaled = loader.epoch(0, 1), self.options.precision == "fp16"
        return model_checks.gradients_arrive(
            state.model, learning, lambda: train_fn(state, batches, self.run, self.few), scaled=scaled
        )

    def checkpoint(self) -> Row:
        """The state of the first stage after some steps, out to the logdir's disk and back into another model."""
        train_loader, valid_loader = self.loaders(self.first, self.few)

        def go_on(state: TrainState, epoch: int) -> Any:
            learned = train_fn(state, train_loader.epoch(0, epoch), self.run, self.few)
            return {"train": learned, "valid": valid_fn(state.model, valid_loader, self.run, self.few)}

        repeats = self.options.deterministic or self.device.type == "cpu"
        return model_checks.checkpoint_comes_back(
            self.options.logdir,
            lambda stream: self.make_state(self.first, len(train_loader), stream),
            self.pack,
            go_on if repeats else None,
        )

    def logdir(self) -> Row:
        """Whether train.py would take it."""
        return machine_checks.logdir_is_free(self.options.logdir, resume=self.options.resume)

    def disk(self) -> Row:
        """Room for the checkpoints of all stages."""
        options = self.options
        sizes = [machine_checks.count_state_bytes(self.make_state(stage, 1), self.pack) for stage in options.stages]
        within = options.checkpoint_every_minutes is not None or options.checkpoint_every_steps is not None
        kept = [
            machine_checks.kept_checkpoints(stage.epochs, options.save_n_best, within_epochs=within)
            for stage in options.stages
        ]
        return machine_checks.disk_has_room(options.logdir, sizes, kept)

    def processes(self) -> Row:
        """Those of scripts/train_ddp.sh."""
        return machine_checks.processes_meet(self.device, self.options.accumulation_steps, self.options.batch_size)

    def loader(self) -> Row:
        """Its speed against that of the model."""
        speeds = {stage.name: self.speed_of(stage) for stage in reversed(self.options.stages)}
        return machine_checks.loader_keeps_up(speeds, self.options.batch_size)

    def whole_run(self) -> Row:
        """Its time, and the memory so far."""
        validations = 1 if self.options.ema_decay is None else 2
        lengths = [
            machine_checks.Length(
                stage.epochs, len(self.loaders(stage, self.options)[0]), validations, self.speed_of(stage)
            )
            for stage in self.options.stages
        ]
        row = machine_checks.run_takes(lengths, peak_memory(self.device), patient=self.options.patience is None)
        return row._replace(seen=f"{row.seen}; --compile was left out here") if self.options.compile else row

    def speed_of(self, stage: Stage) -> Speed:
        """Measured once for stages that differ in nothing that matters for it."""
        return self.measure(replace(self.first, image_size=stage.image_size, freeze=stage.freeze))

    def _measure(self, stage: Stage) -> Speed:
        limit = self.options.limit_batches or STEPS_TIMED
        train_loader, _ = self.loaders(stage, replace(self.plain, limit_batches=min(STEPS_TIMED, limit)))
        _, valid_loader = self.loaders(stage, replace(self.plain, limit_batches=min(2, limit)))
        state = self.make_state(stage, len(train_loader))
        kept: list[Batch] = []  # the micro-batches of the first step

        def load() -> Iterator[None]:
            for batch in train_loader.epoch(0, 1):
                if not kept or not kept[-1].ends_step:
                    kept.append(batch)
                if batch.ends_step:
                    yield

        loading = mean(seconds_each(load()))  # workers bring several at once
        steps: Any = (train_fn(state, kept, self.run, self.plain) for _ in range(STEPS_TIMED))  # type: ignore[arg-type]
        validations = (valid_fn(state.model, valid_loader, self.run, self.plain) for _ in range(3))
        step, validation = median(seconds_each(steps)), median(seconds_each(validations))
        validation *= self.loaders(stage, self.options)[1].size / valid_loader.size
        workers = self.options.num_workers
        return Speed(loading, step, validation, choose_num_workers(self.device) if workers is None else workers)


if __name__ == "__main__":
    run_command(main, Options)
