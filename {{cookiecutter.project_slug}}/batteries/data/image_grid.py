"""Grids and thumbnails of samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from batteries.data.image_decoding import decode_file, encode_png
from batteries.data.loaders import TrainLoader
from batteries.data.masks import palette

SAMPLES = 8  # columns of a grid
THUMBNAIL = 192  # pixels; sharp enough at the size that the report shows


def sample_grid(loader: TrainLoader, normalize: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """Draw the first samples of the first epoch: the originals in the upper row, the input of the model below.

    Returns:
        The grid, shape (3, H, W), uint8; None if the samples are not images (C, H, W).
    """
    originals, images, _ = loader.epoch(0, 1).peek(SAMPLES)
    inputs = normalize(images).cpu()
    if inputs.ndim != 4 or any(getattr(original, "ndim", 0) != 3 for original in originals):
        return None
    return make_grid_of_samples(originals, inputs)


def read_png(path: Path) -> torch.Tensor | None:
    """Read a PNG file as an RGB image, shape (3, H, W), uint8; return None if it does not exist."""
    return decode_file(path, "RGB") if path.is_file() else None


def thumbnail(image: Any) -> bytes | None:
    """Encode a sample as a PNG of at most THUMBNAIL pixels per side.

    Args:
        image: The sample, shape (C, H, W). uint8 is shown unchanged; other types are stretched to their range.

    Returns:
        The bytes of the file; None if the sample is not an image.
    """
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        return None
    shown = image.cpu().float() / 255 if image.dtype == torch.uint8 else stretch(image.cpu().float())
    scale = min(1.0, THUMBNAIL / max(shown.shape[1:]))
    if scale < 1:
        shown = resize(shown, [max(1, round(side * scale)) for side in shown.shape[1:]])
    return encode_png((to_rgb(shown) * 255).round().to(torch.uint8))


def mask_panels(image: torch.Tensor, target: torch.Tensor, predicted: np.ndarray) -> bytes:
    """Draw an image, and the image with the masks of its target and its prediction, side by side.

    Args:
        image: The image (C, H, W), uint8.
        target: Its mask (H, W).
        predicted: The predicted mask (H, W).

    Returns:
        The bytes of a PNG file of at most THUMBNAIL pixels in height.
    """
    shown = to_rgb(image.cpu().float() / 255)
    panels = [shown, overlay(shown, target), overlay(shown, torch.from_numpy(predicted))]
    scale = min(1.0, THUMBNAIL / max(shown.shape[1:]))
    if scale < 1:
        panels = [resize(panel, [max(1, round(side * scale)) for side in shown.shape[1:]]) for panel in panels]
    gap = torch.ones(3, panels[0].shape[1], 2)
    return encode_png((torch.cat([panels[0], gap, panels[1], gap, panels[2]], dim=2) * 255).round().to(torch.uint8))


def overlay(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Colour the pixels of a float image (3, H, W), 0 to 1, by the class of each in a mask (H, W), except class 0."""
    colours = torch.from_numpy(palette())[mask.long()].permute(2, 0, 1).float() / 255
    return torch.where(mask > 0, 0.5 * image + 0.5 * colours, image)


def make_grid_of_samples(originals: Sequence[Any], inputs: torch.Tensor) -> torch.Tensor:
    """Draw two rows of images.

    Args:
        originals: The upper row, images (C, H, W), uint8.
        inputs: The lower row, shape (N, C, H, W), stretched to its range.

    Returns:
        The grid, shape (3, H, W), uint8.
    """
    from torchvision.utils import make_grid

    upper = [resize(original.float() / 255, inputs.shape[-2:]) for original in originals]
    rows = torch.cat([torch.stack(upper), stretch(inputs)])
    return (make_grid(to_rgb(rows), nrow=len(inputs), pad_value=1.0) * 255).round().to(torch.uint8)


def resize(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize a float image (C, H, W) to `size` (height, width)."""
    return interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def stretch(images: torch.Tensor) -> torch.Tensor:
    """Scale float images of any range to 0 to 1."""
    low, high = images.min(), images.max()
    return (images - low) / (high - low).clamp(min=1e-8)


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Return images (..., C, H, W) with three channels; unless there are three, each is the mean of all."""
    if images.shape[-3] == 3:
        return images
    return images.mean(-3, keepdim=True).expand(*images.shape[:-3], 3, *images.shape[-2:])
