"""A hash of the training data."""

import hashlib
from typing import Any

import numpy as np


def fingerprint(*values: Any) -> str:
    """Return the sha256 of arrays, texts and numbers; it identifies the data that a run is trained on."""
    digest = hashlib.sha256()
    for value in values:
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
