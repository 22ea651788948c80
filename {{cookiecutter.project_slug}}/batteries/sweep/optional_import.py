"""Optuna, which is an optional dependency."""

import importlib
import warnings
from typing import Any

from batteries.core.errors import UserError

INSTALL = "uv run --extra sweep python tools/sweep.py …, or pip install optuna"


def import_optuna() -> Any:
    """Return the module optuna, without its log lines and warnings. Raises UserError if it is not installed."""
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise UserError(f"tools/sweep.py needs Optuna, which is not installed; install it: {INSTALL}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # multivariate, constant_liar
    return optuna
