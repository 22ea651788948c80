"""Layer 1: networks of libraries, for experiment/model.py."""
