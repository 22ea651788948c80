"""Decide once which samples train, validate and test, write it down, and look at the data while doing so.

    python tools/split.py                                    # splits/default.csv, by experiment/splits.py
    python tools/split.py --num-folds 10 --split-file splits/ten.csv
    python tools/split.py --statistics                       # the constants for experiment/augmentations.py

A split file is never changed: results of before would no longer compare. Give another --split-file instead.
train.py makes the file of its --split-file itself where there is none, without the looks at the data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tyro.conf import arg

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN, has_classes
from batteries.data.duplicates import find_duplicates
from batteries.data.image_stats import ImageSignature, channel_statistics, image_signatures
from batteries.data.loaders import EvalLoader
from batteries.data.splits import TEST, SplitFile
from experiment.augmentations import valid_transform
from experiment.dataset import load_dataset
from experiment.splits import NUM_FOLDS, TEST_FRACTION, make_folds

MOST_NAMED = 10  # duplicates and classes that are listed one by one


@dataclass(frozen=True)
class Config:
    """Write a split file, once, and count what is in it."""

    split_file: Path = Path("splits/default.csv")  # the file; one that is there and different is refused
    data_dir: Path = Path("data")  # where data sets that are files are kept
    num_folds: int = NUM_FOLDS  # parts of what is not held out; each validates in turn
    # Fraction of all samples held out as the test split. --test-share, its former name, still works.
    test_fraction: Annotated[float, arg(aliases=("--test-share",))] = TEST_FRACTION
    keep: bool = False  # take the file as it is, however it was made
    check_images: bool = True  # read every image once: name broken ones, and those that are in two parts
    statistics: bool = False  # mean and deviation of each channel, from the train split of --fold alone
    fold: int = 0  # which fold validates, for --statistics


def main(config: Config) -> None:
    """Make the split or compare it with its file, look at the data, write."""
    dataset = load_dataset(config.data_dir)
    splits = open_split(config, dataset)
    for fold in (config.fold, *range(splits.num_folds)):
        splits.select(fold)
    if config.check_images:
        check_images(dataset, splits.folds)
    statistics = describe_channels(dataset, splits, config.fold) if config.statistics else []
    say = "is there already, and the same" if config.split_file.exists() else "is written"
    splits.write()
    show_counts(dataset, splits.folds)
    if left_out := getattr(dataset, "left_out", ""):
        print(f"left out: {left_out}")
    print(
        f"{config.split_file} {say}: {len(dataset):,} samples, {splits.num_folds} folds, sha256 {splits.sha256[:12]}…"
    )
    print(*statistics, sep="\n", end="\n" if statistics else "")


def open_split(config: Config, dataset: Any) -> SplitFile:
    """The split of this configuration. Raises BadInput where its file has another."""

    def make(dataset: Any) -> np.ndarray:
        return make_folds(dataset, config.num_folds, config.test_fraction)

    splits = SplitFile(config.split_file, dataset, make)
    if config.split_file.exists() and not config.keep and not np.array_equal(splits.folds, make(dataset)):
        raise UserError(
            f"{config.split_file} is there and another split than this would be; write it under another name, such as "
            f"--split-file {config.split_file.with_stem(config.split_file.stem + '_2')}, or look at it with --keep."
        )
    return splits


def check_images(dataset: Any, folds: np.ndarray) -> None:
    """Read every image. Raises BadInput where some are broken; says which are in two parts."""
    from rich.progress import track

    found = list(track(image_signatures(dataset, range(len(dataset))), "images", total=len(dataset), transient=True))
    if broken := [look for look in found if isinstance(look, str)]:
        raise UserError(f"{len(broken)} of {len(found)} images cannot be read: {' '.join(broken[:MOST_NAMED])}")
    looks = [look for look in found if isinstance(look, ImageSignature)]
    pairs = find_duplicates(looks, folds)
    for pair in pairs[:MOST_NAMED]:
        one, other = (f"{dataset.ids[index]} ({name_of(folds[index])})" for index in pair[:2])
        print(f"{one} and {other} are {'equal' if pair.equal else 'nearly equal'}")
    equal = sum(pair.equal for pair in pairs)
    print(f"duplicates across folds: {equal} equal, {len(pairs) - equal} nearly equal", end="")
    print("; give both of a pair one group" if pairs else "")
    if has_classes(dataset):
        name_contradictions(dataset, looks)


def name_contradictions(dataset: Any, looks: list[ImageSignature]) -> None:
    """Say which equal images have different targets, in whatever folds."""
    targets = np.asarray(dataset.targets)
    known = np.flatnonzero(targets != UNKNOWN)
    pairs = [pair for pair in find_duplicates([looks[index] for index in known], targets[known]) if pair.equal]
    for pair in pairs[:MOST_NAMED]:
        one, other = (f"{dataset.ids[index]} ({dataset.classes[targets[index]]})" for index in known[list(pair[:2])])
        print(f"{one} and {other} are equal, and their targets are not")
    if pairs:
        print(f"contradictions: {len(pairs)} pairs of equal images with different targets; mend or leave them out")


def show_counts(dataset: Any, folds: np.ndarray) -> None:
    """A table of samples per class and fold."""
    from rich.console import Console
    from rich.table import Table

    numbers = [number for number in [*range(folds.max() + 1), TEST] if (folds == number).any()]
    table = Table("class" if has_classes(dataset) else "", *map(name_of, numbers), "all")
    rows = {"all": np.ones(len(folds), bool)}
    if has_classes(dataset):
        targets = np.asarray(dataset.targets)
        rows = {str(name): targets == index for index, name in enumerate(dataset.classes[: MOST_NAMED * 5])} | rows
        if (targets < 0).any():
            rows["not known"] = targets < 0
    for name, chosen in rows.items():
        counts = [int((chosen & (folds == number)).sum()) for number in numbers]
        table.add_row(name, *[f"{count:,}" for count in [*counts, sum(counts)]])
    Console(width=max(160, Console().width), soft_wrap=True).print(table)  # no number is cut


def describe_channels(dataset: Any, splits: SplitFile, fold: int) -> list[str]:
    """The lines for experiment/augmentations.py, from images as `valid_transform` gives them."""
    train = splits.select(fold).train
    loader = EvalLoader(dataset, train, valid_transform(), torch.device("cpu"), batch_size=64)
    mean, std = channel_statistics(images for images, _ in loader)
    values = {name: ", ".join(f"{value:.4f}" for value in found) for name, found in (("MEAN", mean), ("STD", std))}
    return [
        f"# from {len(train):,} images: the train split of fold {fold} in {splits.path}",
        *(f"{name} = ({value},)" for name, value in values.items()),
    ]


def name_of(fold: int) -> str:
    """What a fold is called in a table."""
    return "test" if fold == TEST else f"fold {fold}"


if __name__ == "__main__":
    run_command(main, Config, repeats=False)
