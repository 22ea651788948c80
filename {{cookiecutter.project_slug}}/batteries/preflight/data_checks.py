"""Checks of the data."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.text import list_first
from batteries.data.dataset import has_classes
from batteries.data.duplicates import find_duplicates
from batteries.data.image_stats import ImageSignature, image_signature
from batteries.data.splits import Split, SplitFile, check_files
from batteries.preflight.results import CheckResult, describe_error

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


def open_samples(dataset: Any, indices: np.ndarray, threads: int = 8) -> list[ImageSignature | str | None]:
    """For each sample what is kept of it (None where it is no image), or the sentence that says what is wrong."""
    targets = np.asarray(dataset.targets) if has_classes(dataset) else None

    def attempt(index: int) -> ImageSignature | str | None:
        try:
            return read_sample(dataset, targets, index)
        except Exception as error:  # noqa: BLE001 (whatever it is, the sample is named)
            return f"{dataset.ids[index]}: {describe_error(error)}"

    with ThreadPoolExecutor(threads) as pool:  # torchvision decodes without python's lock
        return list(pool.map(attempt, indices.tolist()))


def read_sample(dataset: Any, targets: np.ndarray | None, index: int) -> ImageSignature | None:
    """A look at one sample. Raises BadInput where it is not finite, or has another target than `targets` (N,) say."""
    image, target = dataset[index]
    if targets is not None and 0 <= targets[index] != int(target):
        raise UserError(f"its target is {int(target)}, and {targets[index]} in the data set's targets.")
    if not isinstance(image, torch.Tensor):
        return None
    if not image.isfinite().all():
        raise UserError("it has values that are not finite.")
    return image_signature(image) if image.ndim == 3 else None


def check_samples_load(
    dataset: Any, split: Split, indices: np.ndarray, found: Sequence[ImageSignature | str | None]
) -> CheckResult:
    """Whether the samples that were opened are images, and each has the target that the data set says."""
    check_files(dataset, split)
    count, total = len(indices), sum(map(len, split))
    some = f"{count:,} of {total:,} samples, by chance," if count < total else f"all {total:,} samples"
    if broken := [text for text in found if isinstance(text, str)]:
        others = "; a larger --samples may find more" if count < total else ""
        details = f"tried {some.rstrip(',')}; of {len(broken):,} this is wrong: {list_first(broken, MOST_NAMED)}"
        return CheckResult("fail", details, f"mend these files or leave them out{others}")
    left_out = getattr(dataset, "left_out", "")
    return CheckResult("pass", f"{some} open{'; left out: ' * bool(left_out)}{left_out}")


def check_class_counts(splits: SplitFile, fold: int) -> CheckResult:
    """Whether each part has samples of each class, and how many of the rarest and of the largest."""
    dataset = splits.dataset
    splits.select(fold)  # raises where a class is missing in a part
    parts = splits.cut(fold)._asdict()
    if not has_classes(dataset):
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
        return CheckResult("pass", f"{sizes} samples; their targets are no classes, so none are counted")
    targets, classes = np.asarray(getattr(dataset, "targets", ())), list(getattr(dataset, "classes", ()))
    counts = {name: _count_classes(targets[part], len(classes)) for name, part in parts.items()}
    known = ", ".join(f"{name} {len(parts[name]):,} ({_range(count)})" for name, count in counts.items())
    details, train = f"{len(classes)} classes, samples (of a class): {known}", counts["train"]
    if train.max() < RARE * train.min():
        return CheckResult("pass", details)
    rare, large = int(train.argmin()), int(train.argmax())
    details += f"; {train.max() / train.min():.0f} times as many {classes[large]} as {classes[rare]}"
    return CheckResult(
        "warning", details, "rank by --main-metric balanced_accuracy or macro_f1; accuracy hides rare classes"
    )


def check_duplicates(
    dataset: Any, split: Split, indices: np.ndarray, found: Sequence[ImageSignature | str | None]
) -> CheckResult:
    """Whether an image that was opened is in two parts of the split, equal or nearly so."""
    parts = np.full(len(dataset), -1)
    for number, part in enumerate(split):
        parts[part] = number
    sound = [place for place, kept in enumerate(found) if isinstance(kept, ImageSignature)]
    looks = [kept for kept in found if isinstance(kept, ImageSignature)]
    if not looks:
        return CheckResult("warning", "not tried: no sample is an image (C, H, W) that opens")
    indices = indices[sound]
    pairs = find_duplicates(looks, parts[indices])
    equal = sum(pair.equal for pair in pairs)
    if not pairs:
        return CheckResult("pass", f"none in two parts, among {len(looks):,} images")
    details = f"in two parts are {equal:,} equal and {len(pairs) - equal:,} nearly equal images, of {len(looks):,}"
    named = [_name_pair(dataset, indices[pair.first], indices[pair.second], parts, Split._fields) for pair in pairs]
    held_out = int((parts[indices] > 0).sum())
    outcome = "fail" if equal >= MANY_DOUBLES * held_out and equal else "warning"
    hint = "give both of a pair one group, or leave one out; `python tools/split.py` names more"
    return CheckResult(outcome, f"{details}: {list_first(named, MOST_NAMED)}", hint)


def check_normalization(batches: Iterable[torch.Tensor]) -> CheckResult:
    """Whether normalised images (N, C, H, W), as the model gets them, have about mean 0 and deviation 1."""
    count, total, squares, low, high = 0, torch.zeros(()), torch.zeros(()), np.inf, -np.inf
    for images in batches:
        values = images.detach().cpu().double().transpose(0, 1).flatten(1)
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    details = f"mean {_numbers(mean)}, deviation {_numbers(deviation)}, values {low:.2f} to {high:.2f}, after normalize"
    hint = "`python tools/split.py --keep --statistics` prints MEAN and STD for experiment/augmentations.py"
    if not (mean.isfinite().all() and deviation.isfinite().all()):
        return CheckResult("fail", f"{details}: not all are finite", "look at normalize in experiment/augmentations.py")
    if _is_off(mean, deviation, WRONG_MEAN, WRONG_DEVIATION):
        return CheckResult("fail", f"{details}: far from 0 and 1", hint)
    if _is_off(mean, deviation, FAR_MEAN, FAR_DEVIATION):
        return CheckResult("warning", f"{details}: not very near 0 and 1", hint)
    return CheckResult("pass", details)


def some_of_each_class(dataset: Any, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` of `indices`, of as many classes as there are, alike; the first ones where targets are no classes."""
    if not has_classes(dataset):
        return indices[:count]
    import pandas as pd

    targets = pd.Series(np.asarray(dataset.targets)[indices])
    turns = targets.groupby(targets).cumcount()  # 0 for the first sample of its class, 1 for the second
    return indices[np.argsort(turns.to_numpy(), kind="stable")[:count]]


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
