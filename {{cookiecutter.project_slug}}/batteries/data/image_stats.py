"""Channel statistics and image signatures."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from batteries.core.errors import UserError

THUMB = 32  # pixels on a side of the thumbnail that hash and comparison look at


class ImageSignature(NamedTuple):
    """What is kept of one image: its pixels' digest, its hash of 64 bits, and its thumbnail (THUMB, THUMB), uint8."""

    digest: bytes
    bits: int
    thumb: np.ndarray


def channel_statistics(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, on the scale 0 to 1.

    Batches are uint8 images (N, C, H, W).
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for images in batches:
        values = images.transpose(0, 1).flatten(1).double() / 255
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


def image_signatures(
    dataset: Any, indices: Sequence[int] | np.ndarray, threads: int = 8
) -> Iterator[ImageSignature | str]:
    """A look at each image, in order, or the sentence that says what is wrong with it."""

    def attempt(index: int) -> ImageSignature | str:
        try:
            return image_signature(dataset[index][0])
        except Exception as error:
            if isinstance(error, UserError):
                return str(error)
            raise

    with ThreadPoolExecutor(threads) as pool:  # torchvision decodes without python's lock
        yield from pool.map(attempt, np.asarray(indices).tolist())


def image_signature(image: torch.Tensor) -> ImageSignature:
    """What is kept of an image (C, H, W).

    The hash is that of the lowest 8 x 8 frequencies (all but the mean) of the grey thumbnail, each over the median or
    not (Zauner 2010, section 3.2.1): it outlives another size, another quality of JPEG and small shifts of colour.
    """
    pixels = np.ascontiguousarray(image.numpy())
    digest = hashlib.sha256(f"{pixels.shape}{pixels.dtype}".encode() + pixels.tobytes()).digest()
    grey = adaptive_avg_pool2d(image[None].float().mean(1, keepdim=True), THUMB)[0, 0].numpy()
    low = (_COSINES @ grey @ _COSINES.T).flatten()[1:]
    bits = np.packbits(np.append(low > np.median(low), False)).view(np.uint64)[0]
    return ImageSignature(digest, int(bits), np.round(grey).astype(np.uint8))


# The first 8 rows of the cosine transform of THUMB numbers.
_COSINES = np.cos(np.pi / THUMB * np.outer(np.arange(8), np.arange(THUMB) + 0.5))
