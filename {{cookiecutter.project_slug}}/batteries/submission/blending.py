"""Blending of matched predictions, and weights that minimise the loss of a blend."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.evaluation.predictions import Kind
from batteries.evaluation.scoring import SMALLEST

Method = Literal["mean", "power", "geometric", "rank"]
BlendFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of tables (M, N, C) and weights (M,)
LossFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
FOLDS = 5  # of the cross-validation of weights


def blend(
    tables: np.ndarray,
    method: Method,
    weights: Sequence[float] | np.ndarray,
    power: float = 2.0,
    *,
    normalize_rows: bool = True,
    is_probability: bool = True,
) -> np.ndarray:
    """Blend the predictions of M models.

    Args:
        tables: Probabilities (M, N, C), or numbers of any range, which have the method "mean" only.
        method: "mean": mean of the probabilities. "power": (sum of w p^power)^(1/power), which favours the model that
            is more confident. "geometric": mean of the logarithms (Hinton 2002, products of experts). "rank": mean of
            `ranks`, which does not depend on the calibration of the models.
        weights: Weights (M,), 0 or more and finite; they are normalized to a sum of one.
        power: The power of "power", over 0.
        normalize_rows: Whether the rows of "power" and "geometric" are normalized to a sum of one.
        is_probability: Whether the predictions are probabilities.

    Returns:
        Predictions (N, C).
    """
    normalized = normalize_weights(weights)
    if method == "mean":
        blended = _weighted_mean(normalized, tables)
    elif method == "rank":
        blended = _weighted_mean(normalized, np.stack([ranks(table) for table in tables]))
    elif method == "power":
        blended = _power_mean(normalized, tables, power)
    else:
        blended = np.exp(_weighted_mean(normalized, np.log(np.maximum(tables, SMALLEST))))
    if normalize_rows and method in ("power", "geometric"):
        blended = blended / blended.sum(1, keepdims=True)
    return np.clip(blended, 0, 1) if is_probability else blended  # rounding can leave the range


def normalize_weights(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return weights (M,), 0 or more and finite, with a sum of one; large weights do not overflow."""
    scaled = np.asarray(weights, dtype=np.float64) / np.max(weights)
    return scaled / scaled.sum()


def _power_mean(weights: np.ndarray, tables: np.ndarray, power: float) -> np.ndarray:
    """Compute (sum of w p^power)^(1/power) for any power over 0, although p^power may be rounded to 0 or to 1."""
    tables = tables[weights > 0]
    weights = weights[weights > 0]
    maximum = tables.max(0)  # (N, C)
    ratios = np.divide(tables, maximum, out=np.ones_like(tables), where=maximum > 0)
    with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf, as it should be
        total = _weighted_mean(weights, ratios**power)
        log_near_one = np.log1p(_weighted_mean(weights, np.expm1(power * np.log(ratios))).clip(min=-1))
        log_total = np.where(total < 0.5, np.log(total), log_near_one)
        return maximum * np.exp(log_total / power)


def ranks(table: np.ndarray) -> np.ndarray:
    """Rank each column of a table (N, C) from 0 (lowest) to 1 (highest); ties get their mean. A single row gets 0.5."""
    import pandas as pd

    if len(table) == 1:
        return np.full(table.shape, 0.5)
    return (pd.DataFrame(table).rank(method="average").to_numpy() - 1) / (len(table) - 1)


def correlations(tables: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation of each pair of models, over all probabilities. Blends gain when it is low.

    Args:
        tables: Probabilities (M, N, C).

    Returns:
        Correlations (M, M); NaN for a model whose probabilities are all equal.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(tables.reshape(len(tables), -1))


class FittedWeights(NamedTuple):
    """Weights of a blend, and the loss that can be expected of them.

    Attributes:
        weights: Weights (M,) with a sum of one.
        loss: The mean loss of fitted weights on samples that they were not fitted on.
        equal_loss: The mean loss of equal weights.
    """

    weights: np.ndarray
    loss: float
    equal_loss: float


def fit_weights(
    tables: np.ndarray, targets: np.ndarray, blend_tables: BlendFunction, kind: Kind = "class"
) -> FittedWeights:
    """Fit the weights with the lowest loss: the cross-entropy of probabilities, or the mean squared error of numbers.

    Their loss is estimated by cross-validation: weights fitted on four fifths of the samples are scored on the last
    fifth. The loss on the samples of the fit would be too low.

    Args:
        tables: Predictions (M, N, C).
        targets: Class indices (N), labels (N, C) or numbers (N, C).
        blend_tables: Blends tables with weights.
        kind: What is predicted.

    Raises:
        UserError: If there are fewer than FOLDS samples.
    """
    from sklearn.model_selection import KFold

    if len(targets) < FOLDS:
        raise UserError(f"--fit-on needs {FOLDS} samples or more, not {len(targets)}.")
    loss_of = LOSSES[kind]
    losses = np.empty(len(targets))
    for fitted, held_out in KFold(FOLDS, shuffle=True, random_state=0).split(targets):
        weights = _minimize_loss(tables[:, fitted], targets[fitted], blend_tables, loss_of)
        losses[held_out] = loss_of(blend_tables(tables[:, held_out], weights), targets[held_out])
    equal = np.full(len(tables), 1 / len(tables))
    equal_loss = loss_of(blend_tables(tables, equal), targets).mean()
    weights = _minimize_loss(tables, targets, blend_tables, loss_of)
    return FittedWeights(weights, float(losses.mean()), float(equal_loss))


def _minimize_loss(
    tables: np.ndarray, targets: np.ndarray, blend_tables: BlendFunction, loss_of: LossFunction
) -> np.ndarray:
    """Minimise the loss over weights with a sum of one by sequential least squares (Kraft 1988), from equal weights.

    The loss is divided by that of equal weights, because the optimiser stops at a change of 1e-6 at any scale.
    """
    from scipy.optimize import minimize

    count = len(tables)
    equal = np.full(count, 1 / count)
    scale = loss_of(blend_tables(tables, equal), targets).mean() or 1.0

    def relative_loss(weights: np.ndarray) -> float:
        return loss_of(blend_tables(tables, _to_simplex(weights)), targets).mean() / scale

    def excess_sum(weights: np.ndarray) -> float:
        return weights.sum() - 1

    result = minimize(
        relative_loss,
        equal,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": excess_sum},
    )
    return _to_simplex(result.x)


def _to_simplex(weights: np.ndarray) -> np.ndarray:
    """Correct the rounding error by which the optimiser leaves its bounds."""
    clipped = np.clip(weights, 0, None)
    return clipped / clipped.sum()


def _class_losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(probabilities[np.arange(len(targets)), targets], SMALLEST))


def _label_losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(np.where(targets == 1, probabilities, 1 - probabilities), SMALLEST)).mean(1)


def _squared_errors(values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.square(values - targets).mean(1)


# Losses per sample (N), of predictions (N, C) and targets.
LOSSES: dict[Kind, LossFunction] = {"class": _class_losses, "labels": _label_losses, "numbers": _squared_errors}
LOSS_NAMES: dict[Kind, str] = {"class": "log_loss", "labels": "log_loss", "numbers": "squared error"}


def _weighted_mean(weights: np.ndarray, tables: np.ndarray) -> np.ndarray:
    return np.tensordot(weights, tables, axes=1)
