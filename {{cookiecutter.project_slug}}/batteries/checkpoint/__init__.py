"""Layer 2: reading and writing checkpoints, retention, manifest, background writer, averaging."""
