"""Several predictions in, one out: means of tables that are matched already, and weights for them."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from batteries.core.errors import UserError
from batteries.evaluation.scoring import SMALLEST

Method = Literal["mean", "power", "geometric", "rank"]
FOLDS = 5  # of the cross-validation of weights


def blend(
    tables: np.ndarray,
    method: Method,
    weights: Sequence[float] | np.ndarray,
    power: float = 2.0,
    *,
    normalise: bool = True,
) -> np.ndarray:
    """Blend probabilities (M, N, C) of M models into (N, C); `weights` (M,) count by their shares.

    mean: of probabilities. power: (sum of w p^power)^(1/power), which leans to the model that is sure. geometric: of
    logarithms (Hinton 2002, products of experts). rank: of `ranks`, blind to how each model is calibrated.
    With `normalise` the rows of power and geometric sum to one again.
    """
    shares = normalize_weights(weights)
    if method == "mean":
        blended = _weighted_mean(shares, tables)
    elif method == "rank":
        blended = _weighted_mean(shares, np.stack([ranks(table) for table in tables]))
    elif method == "power":
        blended = _power_mean(shares, tables, power)
    else:
        blended = np.exp(_weighted_mean(shares, np.log(np.maximum(tables, SMALLEST))))
    if normalise and method in ("power", "geometric"):
        blended = blended / blended.sum(1, keepdims=True)
    return np.clip(blended, 0, 1)  # rounding may leave it by a hair


def normalize_weights(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weights (M,), 0 or more and finite, as shares that sum to one, however large they are."""
    scaled = np.asarray(weights, dtype=np.float64) / np.max(weights)
    return scaled / scaled.sum()


def _power_mean(shares: np.ndarray, tables: np.ndarray, power: float) -> np.ndarray:
    """(sum of w p^power)^(1/power), for any power over 0: p^power alone may be rounded to 0, or to 1."""
    shares, tables = shares[shares > 0], tables[shares > 0]
    top = tables.max(0)  # (N, C)
    ratios = np.divide(tables, top, out=np.ones_like(tables), where=top > 0)
    with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf, as it should be
        total = _weighted_mean(shares, ratios**power)
        near_one = np.log1p(_weighted_mean(shares, np.expm1(power * np.log(ratios))).clip(min=-1))
        return top * np.exp(np.where(total < 0.5, np.log(total), near_one) / power)


def ranks(table: np.ndarray) -> np.ndarray:
    """Each column (N, C) as ranks from 0, the least, to 1, the greatest; ties share their mean. One row is 0.5."""
    import pandas as pd

    if len(table) == 1:
        return np.full(table.shape, 0.5)
    return (pd.DataFrame(table).rank(method="average").to_numpy() - 1) / (len(table) - 1)


def correlations(tables: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each two models (M, M), over all probabilities: blends gain where it is low.

    NaN with a model whose probabilities are all the same.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(tables.reshape(len(tables), -1))


class Fit(NamedTuple):
    """Weights (M,) that sum to one, and the mean loss that they, and equal weights, have on samples kept from them."""

    weights: np.ndarray
    loss: float
    equal_loss: float


def fit_weights(tables: np.ndarray, targets: np.ndarray, mix: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Fit:
    """Weights of least loss (cross-entropy) for tables (M, N, C) and targets (N,); `mix(tables, weights)` blends.

    Their worth is found by cross-validation: weights fitted on four fifths are scored on the last fifth. What a fit
    scores on its own samples flatters it.
    """
    from sklearn.model_selection import KFold

    equal = np.full(len(tables), 1 / len(tables))
    if len(targets) < FOLDS:
        raise UserError(f"--fit-on needs {FOLDS} samples or more, not {len(targets)}.")
    losses = np.empty(len(targets))
    for fitted, kept in KFold(FOLDS, shuffle=True, random_state=0).split(targets):
        weights = _least_loss(tables[:, fitted], targets[fitted], mix)
        losses[kept] = _losses(mix(tables[:, kept], weights), targets[kept])
    equal_loss = _losses(mix(tables, equal), targets).mean()
    return Fit(_least_loss(tables, targets, mix), float(losses.mean()), float(equal_loss))


def _least_loss(
    tables: np.ndarray, targets: np.ndarray, mix: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Weights on the simplex by sequential least squares (Kraft 1988), from equal ones.

    The loss is counted in that of equal weights: the optimiser stops at a change of 1e-6, whatever the scale.
    """
    from scipy.optimize import minimize

    count = len(tables)
    equal = np.full(count, 1 / count)
    scale = _losses(mix(tables, equal), targets).mean() or 1.0
    found = minimize(
        lambda weights: _losses(mix(tables, _on_simplex(weights)), targets).mean() / scale,
        equal,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
    )
    return _on_simplex(found.x)


def _on_simplex(weights: np.ndarray) -> np.ndarray:
    """The optimiser's weights without the hair by which it leaves its bounds."""
    clipped = np.clip(weights, 0, None)
    return clipped / clipped.sum()


def _losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(probabilities[np.arange(len(targets)), targets], SMALLEST))


def _weighted_mean(shares: np.ndarray, tables: np.ndarray) -> np.ndarray:
    return np.tensordot(shares, tables, axes=1)
