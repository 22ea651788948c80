"""Commands, one per workflow step. Run as `python tools/NAME.py` or `python -m tools.NAME`."""
