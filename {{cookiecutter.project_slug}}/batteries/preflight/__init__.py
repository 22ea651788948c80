"""Layer 5: checks of data, model and machine before a long run."""
