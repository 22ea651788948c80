"""Write a split file: which samples are for training, validation and test. Also check the images on the way.

    python tools/split.py                                    # splits/default.csv, by experiment/splits.py
    python tools/split.py --num-folds 10 --split-file splits/ten.csv
    python tools/split.py --statistics                       # constants for experiment/augmentations.py and task.py

An existing split file is never changed, because earlier results would no longer be comparable; give another
--split-file. train.py writes its --split-file too if it does not exist, but does not check the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tyro.conf import arg

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.data.dataset import Dataset, dataset_info, has_classes, has_labels, has_numbers
from batteries.data.duplicates import find_duplicates
from batteries.data.image_stats import ImageSignature, channel_statistics, image_signatures
from batteries.data.loaders import EvalLoader
from batteries.data.splits import TEST, SplitFile
from batteries.data.summary import find_unusual, summary_lines
from batteries.data.targets import describe_target, known_targets, target_names, unknown_samples
from experiment.augmentations import valid_transform
from experiment.dataset import load_dataset
from experiment.splits import NUM_FOLDS, TEST_FRACTION, make_folds

MAX_LISTED = 10  # invalid images and pairs of duplicates
MAX_CLASSES = 50  # rows of the table


@dataclass(frozen=True)
class Config:
    """Write a split file and count its samples."""

    split_file: Path = Path("splits/default.csv")  # the file; one that exists must have the same split
    data_dir: Path = Path("data")  # directory of the data set
    num_folds: int = NUM_FOLDS  # number of folds without the test split; each run validates on one
    # Fraction of all samples held out as the test split. --test-share, its former name, still works.
    test_fraction: Annotated[float, arg(aliases=("--test-share",))] = TEST_FRACTION
    keep: bool = False  # accept an existing file with any split
    check_images: bool = True  # read every image once; report invalid ones and duplicates across folds
    statistics: bool = False  # print mean and standard deviation of the train split: of each channel, and of numbers
    fold: int = 0  # the fold used for validation, for --statistics


def main(config: Config) -> None:
    """Make the split, check the images, and write the file, or compare it with the existing one."""
    dataset = load_dataset(config.data_dir)
    split_file = open_split(config, dataset)
    for fold in (config.fold, *range(split_file.num_folds)):
        split_file.select(fold)  # raises if a class is missing
    if config.check_images:
        check_images(dataset, split_file.folds)
    statistics: list[str] = []
    if config.statistics:
        statistics += channel_lines(dataset, split_file, config.fold)
        statistics += target_lines(dataset, split_file, config.fold)
    status = "is up to date" if config.split_file.exists() else "is written"
    split_file.write()
    print_counts(dataset, split_file.folds, requested_fractions(config, dataset))
    for line in summary_lines(dataset):
        print(line)
    if left_out := dataset_info(dataset).left_out:
        print(f"left out: {left_out}")
    print(
        f"{config.split_file} {status}: {count_of(len(dataset), 'sample')}, {split_file.num_folds} folds, "
        f"sha256 {split_file.sha256[:12]}…"
    )
    for line in statistics:
        print(line)
    for warning in find_unusual(dataset, split_file.folds):
        print(f"warning: {warning}")


def open_split(config: Config, dataset: Dataset) -> SplitFile:
    """Return the split of these options. Raises UserError if the file exists with a different one."""

    def make(dataset: Dataset) -> np.ndarray:
        return make_folds(dataset, config.num_folds, config.test_fraction)

    split_file = SplitFile(config.split_file, dataset, make)
    if config.split_file.exists() and not config.keep and not np.array_equal(split_file.folds, make(dataset)):
        other = config.split_file.with_stem(config.split_file.stem + "_2")
        raise UserError(
            f"{config.split_file} already exists with a different split and is not overwritten; use another file, such "
            f"as --split-file {other}, or accept its split with --keep."
        )
    return split_file


def check_images(dataset: Dataset, folds: np.ndarray) -> None:
    """Read every image, and print duplicates across folds. Raises UserError if an image cannot be read.

    Args:
        dataset: The data set.
        folds: The fold of each sample, shape (N,).
    """
    from rich.progress import track

    results = image_signatures(dataset, range(len(dataset)))
    found = list(track(results, "images", total=len(dataset), transient=True))
    if errors := [result for result in found if isinstance(result, str)]:
        listed = " ".join(errors[:MAX_LISTED])
        raise UserError(f"{len(errors)} of {count_of(len(found), 'image')} cannot be read: {listed}")
    signatures = [result for result in found if isinstance(result, ImageSignature)]
    print_duplicates(dataset, folds, signatures)
    print_contradictions(dataset, signatures)


def print_duplicates(dataset: Dataset, folds: np.ndarray, signatures: Sequence[ImageSignature]) -> None:
    """Print the pairs of equal or nearly equal images in different folds."""
    pairs = find_duplicates(signatures, folds)
    for pair in pairs[:MAX_LISTED]:
        first = f"{dataset.ids[pair.first]} ({fold_name(folds[pair.first])})"
        second = f"{dataset.ids[pair.second]} ({fold_name(folds[pair.second])})"
        print(f"{first} and {second} are {'equal' if pair.equal else 'nearly equal'}")
    equal = sum(pair.equal for pair in pairs)
    advice = "; put the images of a pair into one group" if pairs else ""
    print(f"duplicates across folds: {equal} equal, {len(pairs) - equal} nearly equal{advice}")


def print_contradictions(dataset: Dataset, signatures: Sequence[ImageSignature]) -> None:
    """Print the pairs of equal images with different targets, in the same fold or not."""
    targets = known_targets(dataset)
    if targets is None:
        return
    known = np.flatnonzero(~unknown_samples(targets)).tolist()
    _, numbers = np.unique(targets[known].reshape(len(known), -1), axis=0, return_inverse=True)
    candidates = find_duplicates([signatures[index] for index in known], numbers.reshape(-1))
    pairs = [pair for pair in candidates if pair.equal]
    original = np.asarray(dataset_info(dataset).targets)
    for pair in pairs[:MAX_LISTED]:
        first, second = (
            f"{dataset.ids[index]} ({describe_target(original[index], dataset)})"
            for index in (known[pair.first], known[pair.second])
        )
        print(f"{first} and {second} are equal but have different targets")
    if pairs:
        count = count_of(len(pairs), "pair")
        print(f"contradictions: {count} of equal images with different targets; fix the targets or remove the images")


def requested_fractions(config: Config, dataset: Dataset) -> dict[int, float]:
    """Return the requested fraction of all samples for each fold; none if the data set defines its folds."""
    info = dataset_info(dataset)
    if info.folds is not None:
        return {}
    test = config.test_fraction if info.official_test is None else float(np.mean(info.official_test))
    return {TEST: test} | dict.fromkeys(range(config.num_folds), (1 - test) / config.num_folds)


def print_counts(dataset: Dataset, folds: np.ndarray, requested: dict[int, float]) -> None:
    """Print a table of the samples per class or label and fold, or the means of numbers, and the size of each fold.

    Args:
        dataset: The data set.
        folds: The fold of each sample, shape (N,).
        requested: The requested fraction for each fold, if there are any.
    """
    from rich.console import Console
    from rich.table import Table

    numbers = [number for number in [*range(folds.max() + 1), TEST] if (folds == number).any()]
    kind = "class" if has_classes(dataset) else "label" if has_labels(dataset) else ""
    table = Table(kind, *map(fold_name, numbers), "all")
    for name, chosen in rows_of_counts(dataset).items():
        counts = [int((chosen & (folds == number)).sum()) for number in numbers]
        table.add_row(name, *[f"{count:,}" for count in [*counts, sum(counts)]])
    for name, values in list(numbers_of(dataset).items())[:MAX_CLASSES]:
        means = [format_mean(values[folds == number]) for number in numbers]
        table.add_row(f"mean {name}", *means, format_mean(values))
    if set(numbers) <= set(requested):  # not of a file with other folds, which --keep accepts
        table.add_row("requested", *[f"{requested[number]:.1%}" for number in numbers], "")
    table.add_row("actual", *[f"{(folds == number).mean():.1%}" for number in numbers], "")
    Console(width=max(160, Console().width), soft_wrap=True).print(table)  # wide enough that no number is truncated


def rows_of_counts(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the rows of the table that count samples: for each row, which samples it counts, shape (N,)."""
    rows: dict[str, np.ndarray] = {}
    targets = known_targets(dataset)
    if targets is not None and has_classes(dataset):
        rows = {str(name): targets == index for index, name in enumerate(dataset.classes[:MAX_CLASSES])}
    elif targets is not None and has_labels(dataset):
        names = target_names(dataset, targets.shape[1])
        rows = {name: targets[:, index] == 1 for index, name in enumerate(names[:MAX_CLASSES])}
        if (targets == 0).all(1).any():
            rows["no label"] = (targets == 0).all(1)
    rows["all"] = np.ones(len(dataset), bool)
    if targets is not None and unknown_samples(targets).any():
        rows["unknown"] = unknown_samples(targets)
    return rows


def numbers_of(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the targets that are numbers by their name, each with shape (N,); none for classes and labels."""
    targets = known_targets(dataset)
    if targets is None or not has_numbers(dataset):
        return {}
    columns = targets.reshape(len(targets), -1)
    names = target_names(dataset, columns.shape[1])
    return dict(zip(names, columns.T, strict=True))


def format_mean(values: np.ndarray) -> str:
    """Format the mean of the values that are known; a dash if none is."""
    known = values[~np.isnan(values)]
    return f"{known.mean():.4g}" if len(known) else "–"


def channel_lines(dataset: Dataset, split_file: SplitFile, fold: int) -> list[str]:
    """Return the lines for experiment/augmentations.py: MEAN and STD of images after `valid_transform`."""
    train = split_file.select(fold).train
    loader = EvalLoader(dataset, train, valid_transform(), torch.device("cpu"), batch_size=64)
    mean, std = channel_statistics(images for images, _ in loader)
    return [
        f"# from {count_of(len(train), 'image')}: the train split of fold {fold} in {split_file.path}",
        f"MEAN = ({', '.join(f'{value:.4f}' for value in mean)},)",
        f"STD = ({', '.join(f'{value:.4f}' for value in std)},)",
    ]


def target_lines(dataset: Dataset, split_file: SplitFile, fold: int) -> list[str]:
    """Return the lines for experiment/dataset.py: TARGET_MEAN and TARGET_STD of numbers; none for other targets."""
    train = split_file.select(fold).train
    numbers = [values[train] for values in numbers_of(dataset).values()]
    if not numbers:
        return []
    return [
        f"# for experiment/dataset.py, from {count_of(len(train), 'sample')}: the train split of the same fold",
        f"TARGET_MEAN = ({', '.join(f'{values.mean():.6g}' for values in numbers)},)",
        f"TARGET_STD = ({', '.join(f'{values.std():.6g}' for values in numbers)},)",
    ]


def fold_name(fold: int) -> str:
    """Return the name of a fold in the output."""
    return "test" if fold == TEST else f"fold {fold}"


if __name__ == "__main__":
    run_command(main, Config, repeats=False)
