"""Names of metrics, and their direction if it is known.

Add custom metrics to LOWER_IS_BETTER or HIGHER_IS_BETTER, so that tables are sorted by them in the right order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

ScoreFunction = Callable[[Any, np.ndarray, np.ndarray], Any]  # of sklearn.metrics, targets and predictions

LOWER_IS_BETTER = ("loss", "log_loss", "mae", "rmse")
HIGHER_IS_BETTER = (
    "accuracy",
    "balanced_accuracy",
    "dice",
    "iou",
    "label_accuracy",
    "macro_f1",
    "map",
    "mean_dice",
    "mean_iou",
    "micro_f1",
    "pixel_accuracy",
    "r2",
    "roc_auc",
)


def is_lower_better(metric: str) -> bool:
    """Return whether a lower value of a known metric is better; `mae/age` has the direction of `mae`."""
    return metric.partition("/")[0] in LOWER_IS_BETTER


def is_higher_better(metric: str) -> bool:
    """Return whether a higher value of a known metric is better."""
    return metric.partition("/")[0] in HIGHER_IS_BETTER


def select_scores(functions: Mapping[str, ScoreFunction], names: Iterable[str]) -> dict[str, ScoreFunction]:
    """Return the functions of the scores `names`. `roc_auc/cat` is a value of `roc_auc/`; other names are ignored."""
    requested = set(names)
    requested |= {f"{name.partition('/')[0]}/" for name in requested if "/" in name}
    return {name: function for name, function in functions.items() if name in requested}


def name_values(metrics: Mapping[str, Any], classes: Sequence[str]) -> dict[str, float]:
    """Return metrics as floats.

    Args:
        metrics: Numbers, and arrays with a value for each class, shape (C,), under a name that ends in a slash.
        classes: The names of the classes. `roc_auc/` of the class `cat` becomes `roc_auc/cat`. If there are none,
            arrays are left out.
    """
    named: dict[str, float] = {}
    for name, value in metrics.items():
        if np.ndim(value) == 0 and not name.endswith("/"):
            named[name] = float(value)
        elif name.endswith("/") and len(classes):
            values = np.broadcast_to(value, len(classes))  # NaN if the score is undefined
            named |= {f"{name}{key}": float(part) for key, part in zip(classes, values, strict=True)}
    return named
