"""Stop a stage early when its score no longer gets better."""

import math


class EarlyStopping:
    """Says after which epoch to stop: once `patience` epochs in a row were not better by more than `min_delta`.

    Without `patience` it never does. Scores are equal on all ranks, and so is what it says. A score that is not finite
    is no better one.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0, *, minimize: bool) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.sign = -1 if minimize else 1
        self.best: float | None = None
        self.epochs_since = 0

    def update(self, score: float) -> bool:
        """Take the score of one more epoch; whether it shall be the last."""
        if math.isfinite(score) and (self.best is None or self.sign * (score - self.best) > self.min_delta):
            self.best, self.epochs_since = score, 0
        else:
            self.epochs_since += 1
        return self.patience is not None and self.epochs_since >= self.patience

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"best": self.best, "epochs_since": self.epochs_since}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        self.best, self.epochs_since = state["best"], state["epochs_since"]
