"""Checks of the data: samples, duplicates and normalization."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.text import count_of, list_first
from batteries.data.dataset import Dataset, dataset_info
from batteries.data.duplicates import find_duplicates
from batteries.data.image_stats import ImageSignature, image_signature
from batteries.data.splits import Split, check_files
from batteries.data.targets import known_targets
from batteries.preflight.results import CheckResult, describe_error

MAX_LISTED = 3  # samples listed in a result
MAX_VALUES = 10  # values of a target listed in a result
# Equal images in two splits, as a fraction of the valid and test samples, from which on the check fails: a score can be
# off by as much.
MAX_DUPLICATE_FRACTION = 0.01

# Bounds for normalized values. MNIST normalized with ImageNet's constants has mean -1.5 and standard deviation 1.3: it
# trains, and may do better with its own. Images that were never scaled from 0..255 to 0..1 have one of about 255.
FAR_MEAN, WRONG_MEAN = 0.5, 2.0
FAR_STD, WRONG_STD = 1.5, 4.0


def choose_samples(indices: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return all of `indices`, or `most` of them chosen at random, in ascending order."""
    if len(indices) <= most:
        return np.sort(indices)
    return np.sort(np.random.default_rng(seed).choice(indices, most, replace=False))


def open_samples(dataset: Dataset, indices: np.ndarray, threads: int = 8) -> list[ImageSignature | str | None]:
    """Read samples.

    Returns:
        For each sample the signature of its image, None if it is not an image, or the error as text.
    """
    targets = known_targets(dataset)

    def read(index: int) -> ImageSignature | str | None:
        try:
            return read_sample(dataset, None if targets is None else targets[index], index)
        except Exception as error:  # noqa: BLE001 (the error is reported with the id of the sample)
            return f"{dataset.ids[index]}: {describe_error(error)}"

    with ThreadPoolExecutor(threads) as pool:  # torchcodec decodes without Python's lock
        return list(pool.map(read, indices.tolist()))


def read_sample(dataset: Dataset, known: np.ndarray | None, index: int) -> ImageSignature | None:
    """Read one sample and return the signature of its image; None if it is not an image (C, H, W).

    Args:
        dataset: The data set.
        known: Its row in the output of `known_targets`, or None if the data set has no such targets.
        index: The index of the sample.

    Raises:
        UserError: If a value is not finite, or the target differs from `known`.
    """
    image, target = dataset[index]
    if known is not None and not np.isnan(known).any() and not _are_equal(target, known):
        raise UserError(
            f"its target is {_format_target(target)}, but dataset.targets[{index}] is {_format_target(known)}."
        )
    if not isinstance(image, torch.Tensor):
        return None
    if not image.isfinite().all():
        raise UserError("not every value is finite.")
    return image_signature(image) if image.ndim == 3 else None


def _are_equal(target: Any, known: np.ndarray) -> bool:
    """Return whether a sample has the same class, labels or numbers as `known`, in single precision."""
    values = torch.as_tensor(target, dtype=torch.float32).reshape(-1)
    return torch.equal(values, torch.as_tensor(known, dtype=torch.float32).reshape(-1))


def _format_target(target: Any) -> str:
    values = torch.as_tensor(target).double().reshape(-1).tolist()
    return list_first((f"{value:.9g}" for value in values), MAX_VALUES)


def check_samples_load(
    dataset: Dataset, split: Split, indices: np.ndarray, found: Sequence[ImageSignature | str | None]
) -> CheckResult:
    """Check that samples can be read, and that their targets are those of the data set.

    Args:
        dataset: The data set.
        split: The indices of the fold.
        indices: The samples that were read.
        found: The output of `open_samples` for `indices`.
    """
    check_files(dataset, split)
    count = len(indices)
    total = sum(map(len, split))
    chosen = f" (chosen at random from {total:,})" if count < total else ""
    broken = [text for text in found if isinstance(text, str)]
    if broken:
        details = f"errors in {len(broken):,} of {count_of(count, 'sample')}{chosen}: {list_first(broken, MAX_LISTED)}"
        more = "; a larger --samples may find more" if count < total else ""
        return CheckResult("fail", details, f"fix these files or leave them out{more}")
    left_out = dataset_info(dataset).left_out
    ignored = f"; left out: {left_out}" if left_out else ""
    return CheckResult("pass", f"all {count_of(count, 'sample')}{chosen} load{ignored}")


def check_duplicates(
    dataset: Dataset, split: Split, indices: np.ndarray, found: Sequence[ImageSignature | str | None]
) -> CheckResult:
    """Check that no image is in two splits, equal or nearly equal.

    Args:
        dataset: The data set.
        split: The indices of the fold.
        indices: The samples that were read.
        found: The output of `open_samples` for `indices`.
    """
    split_of = np.full(len(dataset), -1)  # the number of the split of each sample
    for number, members in enumerate(split):
        split_of[members] = number
    places = [place for place, signature in enumerate(found) if isinstance(signature, ImageSignature)]
    signatures = [signature for signature in found if isinstance(signature, ImageSignature)]
    if not signatures:
        return CheckResult("warning", "skipped: no sample could be read as an image of shape (C, H, W)")
    indices = indices[places]
    pairs = find_duplicates(signatures, split_of[indices])
    if not pairs:
        return CheckResult("pass", f"no image is in two splits ({len(signatures):,} compared)")
    equal = sum(pair.equal for pair in pairs)
    named = [_describe_pair(dataset, indices[pair.first], indices[pair.second], split_of) for pair in pairs]
    details = (
        f"{equal:,} equal and {len(pairs) - equal:,} nearly equal pairs of images in different splits, among "
        f"{count_of(len(signatures), 'image')}: {list_first(named, MAX_LISTED)}"
    )
    held_out = int((split_of[indices] > 0).sum())
    outcome = "fail" if equal >= MAX_DUPLICATE_FRACTION * held_out and equal else "warning"
    hint = "put both images of a pair into one group, or leave one out; `python tools/split.py` lists more"
    return CheckResult(outcome, details, hint)


def check_normalization(batches: Iterable[torch.Tensor]) -> CheckResult:
    """Check that each channel has a mean of about 0 and a standard deviation of about 1.

    Args:
        batches: Normalized images (N, C, H, W), as the model gets them.
    """
    count = 0
    total = torch.zeros(())
    squares = torch.zeros(())
    low = np.inf
    high = -np.inf
    for images in batches:
        values = images.detach().cpu().double().transpose(0, 1).flatten(1)  # (C, N * H * W)
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + values.square().sum(1)
        low = min(low, float(values.min()))
        high = max(high, float(values.max()))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    details = f"mean {_format(mean)}, std {_format(std)}, values {low:.2f} to {high:.2f} after normalize"
    if not (mean.isfinite().all() and std.isfinite().all()):
        hint = "check normalize in experiment/augmentations.py"
        return CheckResult("fail", f"{details}; not every value is finite", hint)
    hint = "`python tools/split.py --keep --statistics` prints MEAN and STD for experiment/augmentations.py"
    if _is_off(mean, std, WRONG_MEAN, WRONG_STD):
        return CheckResult("fail", f"{details}; far from mean 0 and std 1", hint)
    if _is_off(mean, std, FAR_MEAN, FAR_STD):
        return CheckResult("warning", f"{details}; not close to mean 0 and std 1", hint)
    return CheckResult("pass", details)


def _is_off(mean: torch.Tensor, std: torch.Tensor, max_mean: float, max_ratio: float) -> bool:
    return bool(((mean.abs() > max_mean) | (std > max_ratio) | (std < 1 / max_ratio)).any())


def _describe_pair(dataset: Dataset, first: int, second: int, split_of: np.ndarray) -> str:
    names = [f"{dataset.ids[index]} ({Split._fields[split_of[index]]})" for index in (first, second)]
    return " and ".join(names)


def _format(values: torch.Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())
