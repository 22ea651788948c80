"""Checks of data and their split: samples that do not open, missing classes, leaks, values out of range."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from batteries.checks import Row, sentence_of
from batteries.errors import BadInput, shorten
from batteries.pixels import Look, find_duplicates, look
from batteries.splits import Split, SplitFile, check_files, has_classes

MOST_NAMED = 3  # samples in a row of the table
RARE = 10  # times fewer samples than the largest class has
MANY_DOUBLES = 0.01  # of the samples that validate or test: a score is off by up to as much
# Of normalised values: MNIST under ImageNet's constants has mean -1.5 and deviation 1.3: it trains, and might do better
# under its own. Images whose values were never brought from 0..255 to 0..1 have a deviation of about 255.
FAR_MEAN, WRONG_MEAN = 0.5, 2.0
FAR_DEVIATION, WRONG_DEVIATION = 1.5, 4.0


def choose_samples(indices: np.ndarray, most: int, seed: int) -> np.ndarray:
    """`indices`, or `most` of them by chance, in ascending order."""
    if len(indices) <= most:
        return np.sort(indices)
    return np.sort(np.random.default_rng(seed).choice(indices, most, replace=False))


def open_samples(dataset: Any, indices: np.ndarray, threads: int = 8) -> list[Look | str | None]:
    """For each sample what is kept of it (None where it is no image), or the sentence that says what is wrong."""
    targets = np.asarray(dataset.targets) if has_classes(dataset) else None

    def attempt(index: int) -> Look | str | None:
        try:
            return read_sample(dataset, targets, index)
        except Exception as error:  # noqa: BLE001 (whatever it is, the sample is named)
            return f"{dataset.ids[index]}: {sentence_of(error)}"

    with ThreadPoolExecutor(threads) as pool:  # torchvision decodes without python's lock
        return list(pool.map(attempt, indices.tolist()))


def read_sample(dataset: Any, targets: np.ndarray | None, index: int) -> Look | None:
    """A look at one sample. Raises BadInput where it is not finite, or has another target than `targets` (N,) say."""
    image, target = dataset[index]
    if targets is not None and 0 <= targets[index] != int(target):
        raise BadInput(f"its target is {int(target)}, and {targets[index]} in the data set's targets.")
    if not isinstance(image, torch.Tensor):
        return None
    if not image.isfinite().all():
        raise BadInput("it has values that are not finite.")
    return look(image) if image.ndim == 3 else None


def data_opens(dataset: Any, split: Split, indices: np.ndarray, found: Sequence[Look | str | None]) -> Row:
    """Whether the samples that were opened are images, and each has the target that the data set says."""
    check_files(dataset, split)
    count, total = len(indices), sum(map(len, split))
    some = f"{count:,} of {total:,} samples, by chance," if count < total else f"all {total:,} samples"
    if broken := [text for text in found if isinstance(text, str)]:
        others = "; a larger --samples may find more" if count < total else ""
        seen = f"tried {some.rstrip(',')}; of {len(broken):,} this is wrong: {shorten(broken, MOST_NAMED)}"
        return Row("fail", seen, f"mend these files or leave them out{others}")
    left_out = getattr(dataset, "left_out", "")
    return Row("pass", f"{some} open{'; left out: ' * bool(left_out)}{left_out}")


def classes_are_there(splits: SplitFile, fold: int) -> Row:
    """Whether each part has samples of each class, and how many of the rarest and of the largest."""
    dataset = splits.dataset
    splits.select(fold)  # raises where a class is missing in a part
    parts = splits.cut(fold)._asdict()
    if not has_classes(dataset):
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
        return Row("pass", f"{sizes} samples; their targets are no classes, so none are counted")
    targets, classes = np.asarray(getattr(dataset, "targets", ())), list(getattr(dataset, "classes", ()))
    counts = {name: _count_classes(targets[part], len(classes)) for name, part in parts.items()}
    known = ", ".join(f"{name} {len(parts[name]):,} ({_range(count)})" for name, count in counts.items())
    seen, train = f"{len(classes)} classes, samples (of a class): {known}", counts["train"]
    if train.max() < RARE * train.min():
        return Row("pass", seen)
    rare, large = int(train.argmin()), int(train.argmax())
    seen += f"; {train.max() / train.min():.0f} times as many {classes[large]} as {classes[rare]}"
    return Row("warning", seen, "rank by --main-metric balanced_accuracy or macro_f1; accuracy hides rare classes")


def no_duplicates(dataset: Any, split: Split, indices: np.ndarray, found: Sequence[Look | str | None]) -> Row:
    """Whether an image that was opened is in two parts of the split, equal or nearly so."""
    parts = np.full(len(dataset), -1)
    for number, part in enumerate(split):
        parts[part] = number
    sound = [place for place, kept in enumerate(found) if isinstance(kept, Look)]
    looks = [kept for kept in found if isinstance(kept, Look)]
    if not looks:
        return Row("warning", "not tried: no sample is an image (C, H, W) that opens")
    indices = indices[sound]
    pairs = find_duplicates(looks, parts[indices])
    equal = sum(pair.equal for pair in pairs)
    if not pairs:
        return Row("pass", f"none in two parts, among {len(looks):,} images")
    seen = f"in two parts are {equal:,} equal and {len(pairs) - equal:,} nearly equal images, of {len(looks):,}"
    named = [_name_pair(dataset, indices[pair.first], indices[pair.second], parts, Split._fields) for pair in pairs]
    held_out = int((parts[indices] > 0).sum())
    outcome = "fail" if equal >= MANY_DOUBLES * held_out and equal else "warning"
    mend = "give both of a pair one group, or leave one out; `python split.py` names more"
    return Row(outcome, f"{seen}: {shorten(named, MOST_NAMED)}", mend)


def values_are_normal(batches: Iterable[torch.Tensor]) -> Row:
    """Whether normalised images (N, C, H, W), as the model gets them, have about mean 0 and deviation 1."""
    count, total, squares, low, high = 0, torch.zeros(()), torch.zeros(()), np.inf, -np.inf
    for images in batches:
        values = images.detach().cpu().double().transpose(0, 1).flatten(1)
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    seen = f"mean {_numbers(mean)}, deviation {_numbers(deviation)}, values {low:.2f} to {high:.2f}, after normalize"
    mend = "`python split.py --keep --statistics` prints MEAN and STD for experiment/augmentations.py"
    if not (mean.isfinite().all() and deviation.isfinite().all()):
        return Row("fail", f"{seen}: not all are finite", "look at normalize in experiment/augmentations.py")
    if _is_off(mean, deviation, WRONG_MEAN, WRONG_DEVIATION):
        return Row("fail", f"{seen}: far from 0 and 1", mend)
    if _is_off(mean, deviation, FAR_MEAN, FAR_DEVIATION):
        return Row("warning", f"{seen}: not very near 0 and 1", mend)
    return Row("pass", seen)


def some_of_each_class(dataset: Any, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` of `indices`, of as many classes as there are, alike; the first ones where targets are no classes."""
    if not has_classes(dataset):
        return indices[:count]
    import pandas as pd

    targets = pd.Series(np.asarray(dataset.targets)[indices])
    turns = targets.groupby(targets).cumcount()  # 0 for the first sample of its class, 1 for the second
    return indices[np.argsort(turns.to_numpy(), kind="stable")[:count]]


def normalised(batches: Iterable[tuple[Any, Any]], normalize: Any) -> Iterator[torch.Tensor]:
    """Images of batches (images, targets), as the model gets them."""
    for images, _ in batches:
        yield normalize(images)


def _is_off(mean: torch.Tensor, deviation: torch.Tensor, most: float, times: float) -> bool:
    return bool(((mean.abs() > most) | (deviation > times) | (deviation < 1 / times)).any())


def _count_classes(targets: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(targets[targets >= 0], minlength=classes)


def _range(counts: np.ndarray) -> str:
    if not counts.any():
        return "targets not known"
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _name_pair(dataset: Any, first: int, second: int, parts: np.ndarray, names: Sequence[str]) -> str:
    one, other = (f"{dataset.ids[index]} ({names[parts[index]]})" for index in (first, second))
    return f"{one} and {other}"


def _numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())
