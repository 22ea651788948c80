"""Fonts of plots."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def missing_letters_as_boxes() -> Iterator[None]:
    """Draw without a warning for each letter that the font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield
