"""Weights of classes in the loss, for data in which some classes are rare."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.core.text import did_you_mean, find_repeated, list_first
from batteries.data.dataset import dataset_info, has_classes, has_labels
from batteries.distributed.collectives import run_on_rank_zero

BALANCED = "balanced"
COLUMNS = ("class", "weight")


def find_class_weights(option: str | None, dataset: Any, train: np.ndarray) -> torch.Tensor | None:
    """Return the weights that --class-weights selects.

    Their mean over the samples of the train split is 1, so that the mean loss keeps its scale. `balanced` weights a
    class with n of N samples by N / (C n), as scikit-learn does; with several labels per sample, a label that is
    present n times is weighted by N / (2 n), and its absence by N / (2 (N - n)).

    Args:
        option: None, `balanced`, or the path of a CSV file with the columns `class` and `weight`.
        dataset: The data set.
        train: The samples of the train split, shape (N,).

    Returns:
        Weights, float32: of each class, shape (C,); for several labels per sample, of absent and of present labels,
        shape (2, C). None if `option` is None.

    Raises:
        UserError: If the targets are not classes or labels, or the file is invalid.
    """
    if option is None:
        return None
    if not has_classes(dataset) and not has_labels(dataset):
        raise UserError(f"--class-weights {option} needs targets that are classes or labels; leave it out.")
    targets = np.asarray(dataset_info(dataset).targets)[train].astype(np.int64)
    if has_classes(dataset):
        counts = np.bincount(targets, minlength=len(dataset.classes))
    else:
        present = (targets > 0).sum(0)
        counts = np.stack([len(train) - present, present])
    weights = _balance(counts) if option == BALANCED else _read(Path(option), dataset, counts)
    return torch.as_tensor(weights, dtype=torch.float32)


def _balance(counts: np.ndarray) -> np.ndarray:
    """Weight each class so that all have the same sum. A class without samples, which has no effect, gets 1."""
    samples = counts.sum(0) if counts.ndim == 2 else counts.sum()
    return np.where(counts > 0, samples / (len(counts) * np.maximum(counts, 1)), 1.0)


def _read(path: Path, dataset: Any, counts: np.ndarray) -> np.ndarray:
    """Read weights, and scale them to a mean of 1 over the samples."""
    given = run_on_rank_zero(lambda: _parse(path, [str(name) for name in dataset.classes]))
    weights = given if counts.ndim == 1 else np.stack([np.ones_like(given), given])
    means = (weights * counts).sum(0) / counts.sum(0)
    if np.any(means <= 0):
        raise UserError(f"--class-weights {path} gives every sample the weight 0; use larger weights.")
    return weights / means


def _parse(path: Path, classes: list[str]) -> np.ndarray:
    """Return the weight of each class, shape (C,)."""
    name = f"--class-weights {path}"
    if not path.is_file():
        raise UserError(f"{name} does not exist; use {BALANCED}, or a CSV file with the columns class and weight.")
    table = read_table(path, name)
    if sorted(table.columns) != list(COLUMNS):
        raise UserError(f"{name} has the columns {', '.join(table.columns) or 'none'}; it needs class and weight.")
    names = table.column("class")
    if repeated := find_repeated(names):
        raise UserError(f"{name} has more than one row of class {list_first(repeated)}; keep one.")
    for unknown in (given for given in names if given not in classes):
        hint = did_you_mean(unknown, classes) or "."
        raise UserError(f"{name} has a class {unknown!r}, which the data set does not have{hint} Remove or rename it.")
    if missing := [one for one in classes if one not in names]:
        raise UserError(f"{name} has no weight of class {list_first(missing)}; add a row.")
    weight_of = dict(zip(names, table.column("weight"), strict=True))
    return np.array([_parse_weight(name, one, weight_of[one]) for one in classes])


def _parse_weight(name: str, given: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{name} has the weight {text!r} for class {given}; use a number of 0 or more.")
    return weight
