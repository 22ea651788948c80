"""The data set, splits, augmentations, model and loss of this experiment; edit them."""
