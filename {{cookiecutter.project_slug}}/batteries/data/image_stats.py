"""Channel statistics and image signatures."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from batteries.core.errors import UserError
from batteries.data.dataset import Samples

THUMB = 32  # pixels per side of the thumbnail for hash and comparison


class ImageSignature(NamedTuple):
    """What duplicates are found by.

    Attributes:
        digest: The sha256 of the pixels.
        bits: The perceptual hash, 64 bits.
        thumb: The grey thumbnail, shape (THUMB, THUMB), uint8.
    """

    digest: bytes
    bits: int
    thumb: np.ndarray


def channel_statistics(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each channel over all pixels, on the scale 0 to 1.

    Args:
        batches: Images (N, C, H, W), uint8.
    """
    count = 0
    total = torch.zeros(())
    squares = torch.zeros(())
    for images in batches:
        values = images.transpose(0, 1).flatten(1).double() / 255
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + values.square().sum(1)
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


def image_signatures(
    dataset: Samples, indices: Sequence[int] | np.ndarray, threads: int = 8
) -> Iterator[ImageSignature | str]:
    """Compute the signature of each image, in order; the error message for one that cannot be read."""

    def signature_or_error(index: int) -> ImageSignature | str:
        try:
            return image_signature(dataset[index][0])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:  # torchcodec decodes without the interpreter lock
        yield from pool.map(signature_or_error, np.asarray(indices).tolist())


def image_signature(image: torch.Tensor) -> ImageSignature:
    """Compute the signature of an image (C, H, W).

    Each bit of the hash is whether one of the lowest 8 x 8 frequencies (without the mean) of the grey thumbnail is
    above their median (Zauner 2010, section 3.2.1). It hardly changes with image size, JPEG quality or small colour
    shifts.
    """
    pixels = np.ascontiguousarray(image.numpy())
    digest = hashlib.sha256(f"{pixels.shape}{pixels.dtype}".encode() + pixels.tobytes()).digest()
    grey = adaptive_avg_pool2d(image[None].float().mean(1, keepdim=True), THUMB)[0, 0].numpy()
    low = (_COSINES @ grey @ _COSINES.T).flatten()[1:]
    bits = np.packbits(np.append(low > np.median(low), False)).view(np.uint64)[0]
    return ImageSignature(digest, int(bits), np.round(grey).astype(np.uint8))


# The first 8 rows of the cosine transform of THUMB numbers.
_COSINES = np.cos(np.pi / THUMB * np.outer(np.arange(8), np.arange(THUMB) + 0.5))
