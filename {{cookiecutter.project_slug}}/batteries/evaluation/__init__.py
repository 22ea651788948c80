"""Layer 3: predictions, scoring, error analysis, test-time augmentation, run selection, cross-validation."""
