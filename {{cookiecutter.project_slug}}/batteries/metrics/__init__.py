"""Layer 1: metrics of labels and of masks, for experiment/task.py."""
