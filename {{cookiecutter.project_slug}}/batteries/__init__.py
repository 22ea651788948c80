"""The training toolkit: deterministic data loading, accumulation, checkpoints, resume, distributed setup, logging.

It contains no task-specific code. A package imports only from packages of lower layers; docs/architecture.md has the
table of layers, and tests/test_architecture.py checks it.
"""
