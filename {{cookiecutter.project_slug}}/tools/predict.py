"""Predict every sample of a split, or other images, with the checkpoint of a run.

    python tools/predict.py --run logs/baseline                                # its best checkpoint, valid and test
    python tools/predict.py --run logs/fold_0 logs/fold_1 --output logs/cv     # out-of-fold, and the mean on test
    python tools/predict.py --run logs/baseline --images photos --tta flip

Several processes (`python -m batteries.distributed.launch tools/predict.py …`) write the same bytes as one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.metric_names import select_scores
from batteries.core.text import find_repeated, list_first
from batteries.data.dataset import Dataset, Samples
from batteries.distributed.collectives import local_rank_zero_first, run_on_rank_zero
from batteries.evaluation.inference import (
    Experiment,
    InferenceOptions,
    load_model,
    load_split,
    open_images,
    predict_run,
    run_config,
    select_indices,
)
from batteries.evaluation.mask_inference import MaskJob, MaskOptions, Member, make_jobs, write_masks
from batteries.evaluation.mask_table import MaskTable
from batteries.evaluation.predictions import Predictions, average_by_id, check_same_names, write_all
from batteries.evaluation.scoring import bootstrap_gap, sample_scores, score
from batteries.evaluation.tta import Views
from batteries.training.setup import setup_training
from experiment import task
from experiment.augmentations import MEAN, normalize, valid_transform
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.splits import make_folds
from train import Config


@dataclass(frozen=True)
class Options:
    """Predict with the checkpoint of a run, or of several runs."""

    run: tuple[Path, ...] = (Path("logs/baseline"),)  # run directories; of several: out-of-fold valid, and their mean
    stage: str | None = None  # by default the stage with the best score
    checkpoint: str = "best"  # best, last, swa (made by tools/average.py), or the path of a file
    split: Literal["valid", "test", "all"] = "all"  # all: both, and the gap between them
    images: Path | None = None  # instead of a split: a directory of images, or a CSV file with a column path
    tta: Views = "none"  # test-time augmentation: the mean over mirrored images, shifted images, or both
    output: Path | None = None  # output directory; by default predictions/ of the run
    overwrite: bool = False  # replace predictions that exist and differ
    probabilities: bool = False  # of masks: also write the probabilities of each pixel, for blends
    rle: bool = False  # of masks: also write their run-length encoding, as valid_rle.csv and test_rle.csv

    data_dir: Path | None = None  # directory of the data set; by default that of the run
    batch_size: int | None = None  # by default the run's valid_batch_size; another one may change the last digits
    num_workers: int | None = None  # loader processes per rank; by default chosen for the machine, 0 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps


def main(options: Options) -> Mapping[str, Predictions | MaskTable]:
    """Predict, write and score; return the predictions by the name of their split."""
    check_options(options)
    configs = [run_config(folder, Config, options.device, options.data_dir) for folder in options.run]
    output = find_output(options)
    first = configs[0]
    with setup_training(first) as device:
        dataset = local_rank_zero_first(lambda: load_dataset(first.data_dir))
        if task.PREDICTIONS == "mask":
            return predict_all_masks(options, configs, dataset, output, device)
        tables = [
            predict_run(folder, config, dataset, device, make_experiment(), inference_options(options))
            for folder, config in zip(options.run, configs, strict=True)
        ]
        # The runs validate on different folds: a sample that one run trained on is predicted by another run.
        order = [str(name) for name in dataset.ids] if options.images is None else None
        merged = {
            name: merge(output / f"{name}.csv", [table[name] for table in tables], order if name == "valid" else None)
            for name in tables[0]
        }
        run_on_rank_zero(lambda: write_all(list(merged.values()), overwrite=options.overwrite))
        run_on_rank_zero(lambda: print_scores(merged, len(options.run), first))
    return merged


def predict_all_masks(
    options: Options, configs: Sequence[Config], dataset: Dataset, output: Path, device: torch.device
) -> dict[str, MaskTable]:
    """Predict, write and score masks; return their tables by the name of the split."""
    experiment = make_experiment()
    mask_options = MaskOptions(
        tta=options.tta,
        batch_size=options.batch_size or configs[0].valid_batch_size,
        num_workers=options.num_workers,
        probabilities=options.probabilities,
        runs=options.rle,
        overwrite=options.overwrite,
    )
    members, splits = [], []
    for folder, config in zip(options.run, configs, strict=True):
        split = load_split(dataset, config, make_folds)
        loaded = load_model(folder, config, dataset, split, device, experiment, inference_options(options))
        members.append(Member(loaded.model, valid_transform(loaded.image_size), config.precision))
        splits.append(split)
    source: Samples = dataset
    if options.images is not None:
        source = open_images(options.images, dataset, experiment.channels)
        jobs_of = {options.images.resolve().stem: [MaskJob(members, np.arange(len(source)))]}
    else:
        selected = [select_indices(split, options.split) for split in splits]
        jobs_of = {name: make_jobs(members, [indices[name] for indices in selected]) for name in selected[0]}
    tables = {
        name: write_masks(output / f"{name}.csv", jobs, source, dataset.classes, device, experiment, mask_options)
        for name, jobs in jobs_of.items()
    }
    run_on_rank_zero(lambda: print_mask_scores(tables, len(members)))
    return tables


def print_mask_scores(tables: Mapping[str, MaskTable], num_models: int) -> None:
    """Print the scores of tables with targets, and the gap between valid and test."""
    for name, table in tables.items():
        scores = "".join(f"  {metric} {value:.4f}" for metric, value in table.scores().items())
        print(f"{name:<8} {len(table.ids):,} masks{scores}  in {table.path}")
    if {"valid", "test"} <= set(tables):
        print_gap(tables["valid"].image_scores(), tables["test"].image_scores(), num_models)


def check_options(options: Options) -> None:
    """Raise UserError for options that do not make sense."""
    for flag in ("probabilities", "rle"):
        if getattr(options, flag) and task.PREDICTIONS != "mask":
            raise UserError(f"--{flag} is for masks; PREDICTIONS in experiment/task.py is {task.PREDICTIONS!r}.")
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} must be 1 or more.")
    if not options.run:
        raise UserError("--run needs a run directory, such as logs/baseline.")
    if repeated := find_repeated(str(run.resolve()) for run in options.run):
        raise UserError(f"--run {list_first(repeated)} is given twice; it would count twice in the mean.")


def make_experiment() -> Experiment:
    """Collect what inference reads of experiment/."""
    return Experiment(
        make_folds=make_folds,
        build_model=build_model,
        task=task,
        normalize=normalize,
        valid_transform=valid_transform,
        channels=len(MEAN),
    )


def inference_options(options: Options) -> InferenceOptions:
    """Select the options of inference."""
    return InferenceOptions(
        stage=options.stage,
        checkpoint=options.checkpoint,
        split=options.split,
        images=options.images,
        tta=options.tta,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )


def find_output(options: Options) -> Path:
    """Return the output directory."""
    if options.output is not None:
        return options.output
    run, *others = options.run
    if others:
        raise UserError("several runs need --output, a directory for their common predictions.")
    return run / "predictions"


def merge(path: Path, tables: Sequence[Predictions], order: Sequence[str] | None) -> Predictions:
    """Merge the predictions of several runs.

    Args:
        path: The file of the result.
        tables: The predictions of each run.
        order: The ids in the order of the result, for tables with different rows (out-of-fold). None: the mean of
            tables with the same rows.
    """
    if order is None:
        for table in tables:
            check_same_names("id", tables[0].name, tables[0].ids, table.name, table.ids)
    return average_by_id(str(path), tables, order or tables[0].ids)


def print_scores(tables: dict[str, Predictions], num_models: int, config: Config) -> None:
    """Print the scores of tables with targets, and the gap between valid and test."""
    functions = select_scores(task.SCORES, (config.main_metric, *config.scores))
    for name, table in tables.items():
        scores = "".join(f"  {metric} {value:.4f}" for metric, value in score(table, functions).items())
        print(f"{name:<8} {len(table.ids):,} rows{scores}  in {table.name}")
    if (threshold := next(iter(tables.values())).threshold) is not None:
        print(f"note     labels count as present from the probability {threshold:.2f} on, chosen on validation")
    if {"valid", "test"} <= set(tables):
        print_gap(sample_scores(tables["valid"]), sample_scores(tables["test"]), num_models)


def print_gap(valid: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], num_models: int) -> None:
    """Print the difference of each mean over samples between valid and test, given by one value per sample."""
    for metric in (name for name in valid if name in test):
        print(f"gap      {metric} of test minus valid {bootstrap_gap(valid[metric], test[metric])}")
    if num_models > 1:
        print(f"note     test is the mean of {num_models} models, valid has one model per sample: expect a gap")


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
