"""Names of metrics whose direction is known."""

# Which way is better; a metric of your own whose less is better belongs here too, so that tables are sorted by it.
LOWER_IS_BETTER = ("loss", "log_loss")
HIGHER_IS_BETTER = ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc")
