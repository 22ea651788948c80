"""Layer 4: predictions, scoring, error analysis, test-time augmentation, run selection, cross-validation."""
