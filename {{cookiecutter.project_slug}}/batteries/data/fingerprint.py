"""A hash of the training data."""

import hashlib
from typing import Any

import numpy as np


def fingerprint(*parts: Any) -> str:
    """A sha256 over arrays, texts and numbers: what a run is trained on."""
    digest = hashlib.sha256()
    for part in parts:
        array = np.ascontiguousarray(part)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
