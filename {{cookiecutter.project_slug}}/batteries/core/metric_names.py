"""Metrics whose direction is known. Add custom metrics, so that tables are sorted by them in the right order."""

LOWER_IS_BETTER = ("loss", "log_loss")
HIGHER_IS_BETTER = ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc")
