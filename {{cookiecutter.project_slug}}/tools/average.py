"""SWA: several checkpoints of one stage in, one better checkpoint out.

    python tools/average.py --run logs/baseline/stage1
    python tools/predict.py --run logs/baseline --stage stage1 --checkpoint swa

Each checkpoint alone, the mean of all and a greedy choice of them are scored on the validation split. The best becomes
swa.pth; where that is a single one, averaging did not help, and it says so. The choice flatters its score there: look
at the test split too.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from batteries.checkpoint.averaging import average_checkpoints, choose_files, greedy, is_better, renew_batchnorm
from batteries.checkpoint.io import apply_checkpoint, save_checkpoint
from batteries.checkpoint.manifest import AVERAGE
from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.files import write_text
from batteries.core.seeding import seed_all
from batteries.data.loaders import TrainLoader
from batteries.distributed.process_group import require_single_process
from batteries.evaluation.inference import check_training_data, load_split, run_config
from batteries.evaluation.inference import find_stage as stage_of
from batteries.evaluation.run_selection import find_checkpoint
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

    run: Path = Path("logs/baseline")  # the folder of a stage, or of a run, whose best stage is taken
    checkpoints: tuple[str, ...] = ("best:5",)  # best:N and last:N of those that the stage has kept, or paths
    overwrite: bool = False  # replace a swa.pth that is there

    data_dir: Path | None = None  # by default the run's
    num_workers: int | None = None  # loader processes; by default from the machine, 0 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps


class Variant(NamedTuple):
    """What could become swa.pth."""

    name: str
    files: Mapping[Path, str]  # with the names by which they are told apart
    score: float


def main(options: Options) -> Variant:
    """Score every variant and keep the best."""
    require_single_process("average.py")
    folder, config = find_stage(options)
    target = folder / AVERAGE
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already; give --overwrite to replace it.")
    files = choose_files(folder, options.checkpoints, minimize=config.minimize_metric)
    with setup_training(config) as device:
        make = build_maker(folder, config, device, options.num_workers)
        names = name_files(files, folder.parent)
        variants = try_variants(names, lambda paths: make(paths)[1], minimize=config.minimize_metric)
        choice = choose(variants, minimize=config.minimize_metric)
        checkpoint, _ = make([*choice.files])
    keep(target, checkpoint, variants, choice, config.main_metric)
    say(target, variants, choice, config.main_metric)
    return choice


def name_files(files: Sequence[Path], run: Path) -> dict[Path, str]:
    """Each file's name or, where another is called so too, its path as seen from the run, where it lies in it."""
    often = Counter(file.name for file in files)
    return {file: file.name if often[file.name] == 1 else path_in(file, run) for file in files}


def path_in(file: Path, run: Path) -> str:
    """The path of `file` in `run`; as it is where it lies elsewhere."""
    here, root = file.resolve(), run.resolve()
    return here.relative_to(root).as_posix() if here.is_relative_to(root) else str(file)


def find_stage(options: Options) -> tuple[Path, Config]:
    """The stage's folder and the run's Config, with what the flags say otherwise."""
    is_run = (options.run / "config.json").is_file() or not (options.run.parent / "config.json").is_file()
    run = options.run if is_run else options.run.parent
    config = run_config(run, Config, options.device, options.data_dir)
    if not is_run:
        return options.run, config
    stages = [stage.name for stage in config.stages]
    return find_checkpoint(options.run, stages, None, "best", minimize=config.minimize_metric).parent, config


def build_maker(
    folder: Path, config: Config, device: torch.device, num_workers: int | None
) -> Callable[[Sequence[Path]], tuple[dict[str, Any], float]]:
    """A function from files to the checkpoint that is their average, and its score on the validation split."""
    dataset = load_dataset(config.data_dir)
    whole = replace(config, num_workers=num_workers, limit_batches=None, mixup=0.0, cutmix=0.0)
    stage = stage_of(config.stages, folder.name)
    split = load_split(dataset, config, make_folds)
    train_loader, valid_loader = make_loaders(stage, dataset, split, device, whole)
    model = build_model(num_classes=len(dataset.classes)).to(device)
    logger = SilentLogger(device)

    def make(files: Sequence[Path]) -> tuple[dict[str, Any], float]:
        checkpoint = average_checkpoints(files)
        check_training_data(folder.parent, checkpoint, dataset, split, config.data_dir)
        apply_checkpoint(checkpoint, str(files[0]), model)
        if len(files) > 1:
            renew(model, train_loader, config.seed)
        metrics = valid_fn(model, valid_loader, logger, config)
        weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        return {**checkpoint, "model_state_dict": weights, "metrics": {"valid": metrics}}, metrics[config.main_metric]

    return make


def renew(model: nn.Module, loader: TrainLoader, seed: int) -> None:
    """Batch norm as training would have it for these weights: one epoch, shuffled and augmented as its first."""
    seed_all(seed)  # of what the model draws
    renew_batchnorm(model, (normalize(batch.images) for batch in loader.epoch(0, 1)))


def try_variants(
    names: Mapping[Path, str], score_of: Callable[[Sequence[Path]], float], *, minimize: bool
) -> list[Variant]:
    """Each of the files, which have these names, alone, best first, the mean of all, and the greedy choice."""
    alone = [Variant(name, {file: name}, score_of([file])) for file, name in names.items()]
    ordered = [file for variant in best_first(alone, minimize=minimize) for file in variant.files]
    uniform = Variant("mean of all", {file: names[file] for file in ordered}, score_of(ordered))
    chosen, score = greedy(ordered, score_of, minimize=minimize)
    best = Variant("greedy", {file: names[file] for file in chosen}, score)
    return [*best_first(alone, minimize=minimize), uniform, best]


def best_first(variants: Sequence[Variant], *, minimize: bool) -> list[Variant]:
    """Best first; ties stay in order."""
    return sorted(variants, key=lambda variant: variant.score if minimize else -variant.score)


def choose(variants: Sequence[Variant], *, minimize: bool) -> Variant:
    """The best; on a tie the earlier: a single file before an average."""
    choice = variants[0]
    for variant in variants[1:]:
        if is_better(variant.score, choice.score, minimize=minimize):
            choice = variant
    return choice


def keep(target: Path, checkpoint: dict[str, Any], variants: Sequence[Variant], choice: Variant, metric: str) -> None:
    """Write the choice, and beside it what it is: the loader compares the file with that."""
    made_of = {"variant": choice.name, "files": [*choice.files.values()]}
    size, sha256 = save_checkpoint(target, {**checkpoint, "average": made_of})
    scores = {variant.name: variant.score for variant in variants}
    note = {"bytes": size, "sha256": sha256, "metric": metric, "score": choice.score, **made_of, "scores": scores}
    write_text(target.with_suffix(".json"), json.dumps(note, indent=2) + "\n")


def say(target: Path, variants: Sequence[Variant], choice: Variant, metric: str) -> None:
    """Every variant with its score, and which one was kept."""
    for variant in variants:
        files = "" if len(variant.files) == 1 else f"  {' + '.join(variant.files.values())}"
        print(f"{metric} {variant.score:.4f}  {variant.name}{files}")
    if len(choice.files) == 1:
        print(f"averaging did not help: no average is over {choice.name}, whose weights are in {target}")
    else:
        print(
            f"{choice.name} is {abs(choice.score - variants[0].score):.4f} better than {variants[0].name}: in {target}"
        )


if __name__ == "__main__":
    run_command(main, Options, repeats=False)
