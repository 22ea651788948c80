"""Layer 4: one training run: its directory, metadata, resume, logging and console output."""
