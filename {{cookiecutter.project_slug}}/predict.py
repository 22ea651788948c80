"""A run and a split in, predictions out.

    python predict.py --run logs/baseline                                   # its best checkpoint, valid and test
    python predict.py --run logs/fold_0 logs/fold_1 --output logs/cv/predictions   # out-of-fold, and the mean on test
    python predict.py --run logs/baseline --images photos --tta flip

Several processes (`python -m batteries.launch predict.py …`) write the same bytes as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from batteries import (
    BadInput,
    EvalLoader,
    evaluation,
    fingerprint,
    first_on_each_machine,
    run_command,
    start_process,
)
from batteries.checkpoints import apply_checkpoint, read_checkpoint, scored_weights
from batteries.distributed import interleave_over_ranks, on_main
from batteries.errors import shorten
from batteries.images import ImageFiles
from batteries.mistakes import has_one_class_each
from batteries.past_runs import find_checkpoint, read_config
from batteries.predictions import Predictions, average_by_id, compare, doubles, write_all
from batteries.scoring import bootstrap_gap, sample_scores, score
from batteries.splits import Split, SplitFile
from batteries.steps import autocast
from batteries.views import Views, make_views
from experiment.augmentations import MEAN, normalize, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_model, to_probabilities
from experiment.splits import make_folds
from train import SCORES, Config, Stage


@dataclass(frozen=True)
class Options:
    """Predict with the checkpoint of a run, or of several."""

    run: tuple[Path, ...] = (Path("logs/baseline"),)  # of several: out-of-fold for valid, their mean for the rest
    stage: str | None = None  # by default the one with the best score
    checkpoint: str = "best"  # best, last, swa (made by average.py), or the path of a file
    split: Literal["valid", "test", "all"] = "all"  # all: both, and the gap between them
    images: Path | None = None  # instead of a split: a folder of images, or a CSV file with a column path
    tta: Views = "none"  # test-time augmentation: the mean over mirrored images, shifted ones, or both
    output: Path | None = None  # a folder; by default predictions/ of the run
    overwrite: bool = False  # replace predictions that are there and differ

    data_dir: Path | None = None  # by default the run's
    batch_size: int | None = None  # by default the run's valid_batch_size; another may change the last digits
    num_workers: int | None = None  # loader processes per rank; by default from the machine, 0 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps


def main(options: Options) -> dict[str, Predictions]:
    """Predict, write and score; the predictions by the name of their split."""
    if options.batch_size is not None and options.batch_size < 1:
        raise BadInput(f"--batch-size {options.batch_size} must be at least 1.")
    if not options.run:
        raise BadInput("--run needs the folder of a run, such as logs/baseline.")
    if doubled := doubles(str(run.resolve()) for run in options.run):
        raise BadInput(f"--run {shorten(doubled)} is given twice; it would count twice in the mean.")
    configs = [configure(folder, options) for folder in options.run]
    output = find_output(options)
    first = configs[0]
    with start_process(first) as device:
        dataset = first_on_each_machine(lambda: load_dataset(first.data_dir))
        parts = [
            predict_run(folder, config, dataset, device, options)
            for folder, config in zip(options.run, configs, strict=True)
        ]
        # In valid each run has its own fold: what one of them trained on, another predicts.
        order = [str(name) for name in dataset.ids] if options.images is None else None
        merged = {
            name: merge(output / f"{name}.csv", [part[name] for part in parts], order if name == "valid" else None)
            for name in parts[0]
        }
        on_main(lambda: write_all(list(merged.values()), overwrite=options.overwrite))
        on_main(lambda: say(merged, len(options.run), first))
    return merged


def configure(folder: Path, options: Any) -> Config:
    """The run's Config, with what the flags say otherwise."""
    config = replace(read_config(folder, Config), device=options.device, data_parallel=False, compile=False)
    return config if options.data_dir is None else replace(config, data_dir=options.data_dir)


def find_output(options: Options) -> Path:
    """The folder for the predictions."""
    if options.output is not None:
        return options.output
    folder, *others = options.run
    if others:
        raise BadInput("several runs need --output, a folder for what they predict together.")
    return folder / "predictions"


def load_split(dataset: Any, config: Config) -> Split:
    """Indices into the data set, as train.py has them."""
    return SplitFile(config.split_file, dataset, make_folds).select(config.fold)


def load_model(
    folder: Path, config: Config, dataset: Any, device: torch.device, options: Any
) -> tuple[nn.Module, int | None]:
    """The run's model with the weights that are asked for, and the image size of their stage.

    Raises BadInput where it learned from other data.
    """
    stages = [stage.name for stage in config.stages]
    minimize = config.minimize_metric
    path = on_main(lambda: find_checkpoint(folder, stages, options.stage, options.checkpoint, minimize=minimize))
    model = build_model(num_classes=len(dataset.classes))
    checkpoint = on_main(lambda: read_checkpoint(path))
    check_data(folder, checkpoint, dataset, config)
    apply_checkpoint({"model_state_dict": scored_weights(checkpoint)}, str(path), model)
    on_main(lambda: print(f"weights  {path}, epoch {checkpoint.get('epoch')}"))
    return model.to(device), stage_of(config, checkpoint["stage"]).image_size


def stage_of(config: Config, name: str) -> Stage:
    """The stage of that name; the last where a checkpoint comes from elsewhere."""
    return next((stage for stage in config.stages if stage.name == name), config.stages[-1])


def check_data(folder: Path, checkpoint: dict[str, Any], dataset: Any, config: Config) -> None:
    """Raise BadInput where a checkpoint was trained on other data: what validated then may have trained it now."""
    learned = (checkpoint.get("resume") or {}).get("data")
    if learned is not None and learned != fingerprint(dataset.fingerprint(), *load_split(dataset, config)):
        raise BadInput(
            f"--run {folder} learned from other data, or another split of them, than {config.data_dir} gives now; "
            f"give the --data-dir of then, or train it again."
        )


def predict_run(
    folder: Path, config: Config, dataset: Any, device: torch.device, options: Options
) -> dict[str, Predictions]:
    """What one run predicts, by the name of the split."""
    model, image_size = load_model(folder, config, dataset, device, options)
    transform = valid_transform(image_size)
    batch_size = options.batch_size or config.valid_batch_size

    def predict(source: Any, indices: np.ndarray) -> Predictions:
        loader = EvalLoader(source, indices, transform, device, batch_size=batch_size, num_workers=options.num_workers)
        ids = tuple(str(source.ids[index]) for index in indices)
        probabilities, targets = predict_fn(model, loader, options.tta, config)
        known = targets if (targets >= 0).all() else None
        return Predictions(str(folder), ids, tuple(dataset.classes), probabilities, known)

    if options.images is not None:
        files = ImageFiles(options.images, channels=len(MEAN))
        return {options.images.resolve().stem: predict(files, np.arange(len(files)))}
    split = load_split(dataset, config)._asdict()
    wanted = [name for name in ("valid", "test") if options.split in (name, "all") and len(split.get(name, ()))]
    if not wanted:
        raise BadInput(f"--split {options.split} is empty in this data set; use --split valid, or --images.")
    return {name: predict(dataset, split[name]) for name in wanted}


def predict_fn(model: nn.Module, loader: EvalLoader, tta: Views, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, classes), float64, and targets (N,), every sample once and in order: the same on each rank.

    Targets are those that come with the images: a data set need not know them of an official test split before.
    """
    mine = []
    with evaluation(model) as network, autocast(loader.device, config.precision):
        for images, targets in loader:
            views = [to_probabilities(network(normalize(view)).cpu().double()) for view in make_views(images, tta)]
            if views[0].ndim != 2:
                raise BadInput(
                    f"the model gives {tuple(views[0].shape[1:])} for a sample, and predictions are tables with one "
                    f"number per class: for masks and their like, write what it gives as your task wants it."
                )
            mine.append((torch.stack(views).mean(0).numpy(), targets.cpu().numpy()))  # (batch, classes), (batch,)
    probabilities, targets = map(np.concatenate, zip(*interleave_over_ranks(mine), strict=True))
    assert len(probabilities) == loader.size, f"{len(probabilities)} samples instead of {loader.size}"
    return probabilities, targets


def merge(path: Path, tables: Sequence[Predictions], order: Sequence[str] | None) -> Predictions:
    """The predictions of several runs as one: all rows of any of them in `order`, or the mean over the same rows.

    A file has targets only where each is one class.
    """
    tables = [table if has_one_class_each(table) else replace(table, targets=None) for table in tables]
    if order is None:
        for table in tables:
            compare("id", tables[0].name, tables[0].ids, table.name, table.ids)
    return average_by_id(str(path), tables, order or tables[0].ids)


def say(tables: dict[str, Predictions], models: int, config: Config) -> None:
    """Scores where targets are known, those that the run asked for too, and how far test is from valid."""
    asked = {name: SCORES[name] for name in SCORES if name in (config.main_metric, *config.scores)}
    for name, table in tables.items():
        scores = "".join(f"  {metric} {value:.4f}" for metric, value in score(table, asked).items())
        print(f"{name:<8} {len(table.ids):,} rows{scores}  in {table.name}")
    if {"valid", "test"} <= set(tables):
        ours, theirs = sample_scores(tables["valid"]), sample_scores(tables["test"])
        for metric in (name for name in ours if name in theirs):
            print(f"gap      {metric} of test less valid {bootstrap_gap(ours[metric], theirs[metric])}")
        if models > 1:
            print(f"note     test is the mean of {models} models, valid one model a sample: that alone makes a gap")


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
