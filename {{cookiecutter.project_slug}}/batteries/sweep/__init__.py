"""Layer 5: sweeps over options of train.py, with Optuna."""
