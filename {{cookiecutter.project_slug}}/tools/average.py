"""Average the weights of several checkpoints of a stage (SWA).

    python tools/average.py --run logs/baseline/stage1
    python tools/predict.py --run logs/baseline --stage stage1 --checkpoint swa

Each checkpoint, the mean of all and a greedy choice of them are scored on the validation split. The best of these is
written to swa.pth. It is a single checkpoint if averaging does not improve the score. The validation score of the
choice is optimistic, because the choice was made by it; compare the test split too.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from batteries.checkpoint.averaging import (
    average_checkpoints,
    estimate_batchnorm,
    greedy_soup,
    is_better,
    select_checkpoints,
)
from batteries.checkpoint.io import apply_checkpoint, save_checkpoint
from batteries.checkpoint.manifest import AVERAGE
from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.files import write_text
from batteries.core.seeding import seed_all
from batteries.data.loaders import TrainLoader
from batteries.distributed.process_group import require_single_process
from batteries.evaluation.inference import check_training_data, find_stage, load_split, run_config
from batteries.evaluation.run_selection import find_checkpoint
from batteries.models.options import model_arguments
from batteries.training.setup import setup_training
from batteries.training.state import SilentLogger
from experiment.augmentations import normalize
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.splits import make_folds
from train import Config, make_loaders, valid_fn


@dataclass(frozen=True)
class Options:
    """Average checkpoints of a stage."""

    run: Path = Path("logs/baseline")  # directory of a stage, or of a run; of a run the best stage is used
    checkpoints: tuple[str, ...] = ("best:5",)  # best:N and last:N of the checkpoints of the stage, or paths
    overwrite: bool = False  # replace an existing swa.pth

    data_dir: Path | None = None  # directory of the data set; by default that of the run
    num_workers: int | None = None  # loader processes; by default chosen for the machine, 0 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps


class Variant(NamedTuple):
    """A candidate for swa.pth.

    Attributes:
        name: Its name in the output and in swa.json.
        files: The checkpoints that are averaged, with the name of each.
        score: The main metric on the validation split.
    """

    name: str
    files: Mapping[Path, str]
    score: float


class Averaged(NamedTuple):
    """An averaged checkpoint and its main metric on the validation split."""

    checkpoint: dict[str, Any]
    score: float


def main(options: Options) -> Variant:
    """Score all variants, and write and return the best one."""
    require_single_process("average.py")
    directory, config = find_run_and_stage(options)
    target = directory / AVERAGE
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} already exists; give --overwrite to replace it.")
    minimize = config.minimize_metric
    files = select_checkpoints(directory, options.checkpoints, minimize=minimize)
    with setup_training(config) as device:
        average = build_averager(directory, config, device, options.num_workers)
        names = name_files(files, directory.parent)
        variants = score_variants(names, lambda paths: average(paths).score, minimize=minimize)
        choice = choose_variant(variants, minimize=minimize)
        checkpoint = average(list(choice.files)).checkpoint
    write_average(target, checkpoint, variants, choice, config.main_metric)
    print_summary(target, variants, choice, config.main_metric)
    return choice


def find_run_and_stage(options: Options) -> tuple[Path, Config]:
    """Return the stage directory, and the Config of its run with the options that were given."""
    directory = options.run
    is_stage = not (directory / "config.json").is_file() and (directory.parent / "config.json").is_file()
    run = directory.parent if is_stage else directory
    config = run_config(run, Config, options.device, options.data_dir)
    if is_stage:
        return directory, config
    stages = [stage.name for stage in config.stages]
    if not any((run / stage / "best.pth").is_file() for stage in stages):
        raise UserError(
            f"{run} has no best.pth, from a complete epoch with a finite score; train it first, with --resume."
        )
    best = find_checkpoint(run, stages, None, "best", minimize=config.minimize_metric)
    return best.parent, config


def name_files(files: Sequence[Path], run: Path) -> dict[Path, str]:
    """Return a distinct name for each file: its file name, or its path within the run if two files have that name."""
    counts = Counter(file.name for file in files)
    return {file: file.name if counts[file.name] == 1 else path_within(file, run) for file in files}


def path_within(file: Path, run: Path) -> str:
    """Return the path relative to the run directory; the unchanged path of a file in another directory."""
    path = file.resolve()
    root = run.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(file)


def build_averager(
    directory: Path, config: Config, device: torch.device, num_workers: int | None
) -> Callable[[Sequence[Path]], Averaged]:
    """Build the function that averages and scores checkpoints.

    Args:
        directory: The stage directory.
        config: The Config of the run.
        device: The device.
        num_workers: The loader processes; None to choose them for the machine.

    Returns:
        A function of one or more files. It estimates the batch norm statistics of two or more on the train split.
    """
    dataset = load_dataset(config.data_dir)
    split = load_split(dataset, config, make_folds)
    stage = find_stage(config.stages, directory.name)
    full_epochs = replace(config, num_workers=num_workers, limit_batches=None, mixup=0.0, cutmix=0.0)
    train_loader, valid_loader = make_loaders(stage, dataset, split, device, full_epochs)
    arguments = model_arguments(build_model, len(dataset.classes), config.model, config.model_args)
    model = build_model(**arguments).to(device)
    logger = SilentLogger(device)

    def average(files: Sequence[Path]) -> Averaged:
        checkpoint = average_checkpoints(files)
        check_training_data(directory.parent, checkpoint, dataset, split, config.data_dir)
        apply_checkpoint(checkpoint, str(files[0]), model)
        if len(files) > 1:
            estimate_batchnorm_on_train_split(model, train_loader, config.seed)
        metrics = valid_fn(model, valid_loader, logger, config)
        weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        checkpoint = {**checkpoint, "model_state_dict": weights, "metrics": {"valid": metrics}}
        return Averaged(checkpoint, metrics[config.main_metric])

    return average


def estimate_batchnorm_on_train_split(model: nn.Module, loader: TrainLoader, seed: int) -> None:
    """Estimate the batch norm statistics over one epoch, shuffled and augmented like the first one of training."""
    seed_all(seed)  # for random numbers that the model draws
    estimate_batchnorm(model, (normalize(batch.images) for batch in loader.epoch(0, 1)))


def score_variants(
    names: Mapping[Path, str], score_of: Callable[[Sequence[Path]], float], *, minimize: bool
) -> list[Variant]:
    """Score the single checkpoints, the mean of all, and a greedy choice.

    Args:
        names: The checkpoints, with the name of each.
        score_of: Returns the score of the average of some checkpoints.
        minimize: Whether a lower score is better.

    Returns:
        The single checkpoints, best first; then the mean; then the greedy choice.
    """
    singles = [Variant(name, {file: name}, score_of([file])) for file, name in names.items()]
    singles = best_first(singles, minimize=minimize)
    ordered = [file for variant in singles for file in variant.files]
    mean = Variant("mean of all", {file: names[file] for file in ordered}, score_of(ordered))
    chosen, score = greedy_soup(ordered, score_of, minimize=minimize)
    greedy = Variant("greedy", {file: names[file] for file in chosen}, score)
    return [*singles, mean, greedy]


def best_first(variants: Sequence[Variant], *, minimize: bool) -> list[Variant]:
    """Sort variants by score, best first; ties keep their order."""
    return sorted(variants, key=lambda variant: variant.score if minimize else -variant.score)


def choose_variant(variants: Sequence[Variant], *, minimize: bool) -> Variant:
    """Return the best variant; on a tie the earlier one, so a single checkpoint is preferred to an average."""
    choice = variants[0]
    for variant in variants[1:]:
        if is_better(variant.score, choice.score, minimize=minimize):
            choice = variant
    return choice


def write_average(
    target: Path, checkpoint: dict[str, Any], variants: Sequence[Variant], choice: Variant, metric: str
) -> None:
    """Write swa.pth and swa.json, which has its sha256, its sources and all scores.

    Args:
        target: The path of swa.pth.
        checkpoint: The averaged checkpoint.
        variants: All variants.
        choice: The variant of `checkpoint`.
        metric: The name of the main metric.
    """
    sources = {"variant": choice.name, "files": list(choice.files.values())}
    size, sha256 = save_checkpoint(target, {**checkpoint, "average": sources})
    description = {
        "bytes": size,
        "sha256": sha256,
        "metric": metric,
        "score": choice.score,
        **sources,
        "scores": {variant.name: variant.score for variant in variants},
    }
    write_text(target.with_suffix(".json"), json.dumps(description, indent=2) + "\n")


def print_summary(target: Path, variants: Sequence[Variant], choice: Variant, metric: str) -> None:
    """Print the score of each variant, and which one was written."""
    for variant in variants:
        files = "" if len(variant.files) == 1 else f"  {' + '.join(variant.files.values())}"
        print(f"{metric} {variant.score:.4f}  {variant.name}{files}")
    best_single = variants[0]
    if len(choice.files) == 1:
        print(f"averaging did not help: no average is better than {choice.name}; its weights are in {target}")
    else:
        difference = abs(choice.score - best_single.score)
        print(f"{choice.name} is {difference:.4f} better than {best_single.name}; its weights are in {target}")


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
