"""Early stopping."""

import math


class EarlyStopping:
    """Decides when to end a stage: after `patience` consecutive epochs without a sufficient improvement.

    Every rank has the same scores, so every rank decides alike.

    Attributes:
        best: The score of the last improvement; None before the first.
        epochs_since: The number of epochs since then.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0, *, minimize: bool) -> None:
        """Create the counter.

        Args:
            patience: The number of epochs without improvement after which to stop; None to never stop.
            min_delta: The score must improve by more than this.
            minimize: Whether a lower score is better.
        """
        self.best: float | None = None
        self.epochs_since = 0
        self._patience = patience
        self._min_delta = min_delta
        self._sign = -1 if minimize else 1

    def update(self, score: float) -> bool:
        """Add the score of one epoch; return whether to stop. A score that is not finite is not an improvement."""
        if self._improves(score):
            self.best = score
            self.epochs_since = 0
        else:
            self.epochs_since += 1
        return self._patience is not None and self.epochs_since >= self._patience

    def state_dict(self) -> dict[str, float | None]:
        """Return the state for a checkpoint."""
        return {"best": self.best, "epochs_since": self.epochs_since}

    def load_state_dict(self, state: dict) -> None:
        """Load the output of `state_dict`."""
        self.best = state["best"]
        self.epochs_since = state["epochs_since"]

    def _improves(self, score: float) -> bool:
        if not math.isfinite(score):
            return False
        return self.best is None or self._sign * (score - self.best) > self._min_delta
