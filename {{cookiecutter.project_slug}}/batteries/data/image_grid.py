"""Pictures of samples, for eyes: what training makes of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from batteries.data.loaders import TrainLoader

SAMPLES = 8  # columns of a sheet
THUMBNAIL = 192  # pixels: sharp enough at the size that a page shows it in


def sample_grid(loader: TrainLoader, normalize: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """The first samples of the first epoch, uint8 (3, H, W): as they are above, as the model gets them below.

    None for samples that are no images (C, H, W).
    """
    originals, images, _ = loader.epoch(0, 1).peek(SAMPLES)
    seen = normalize(images).cpu()
    if seen.ndim != 4 or any(original.ndim != 3 for original in originals):
        return None
    return make_grid_of_samples(originals, seen)


def read_picture(path: Path) -> torch.Tensor | None:
    """A PNG file as uint8 (3, H, W); None where there is none."""
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(str(path), ImageReadMode.RGB) if path.is_file() else None


def thumbnail(image: Any) -> bytes | None:
    """A sample (C, H, W) as a PNG file of at most THUMBNAIL pixels on a side; None for what is no image.

    uint8 is shown as it is, other types stretched to their range.
    """
    from torchvision.io import encode_png

    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        return None
    shown = image.cpu().float() / 255 if image.dtype == torch.uint8 else stretch(image.cpu().float())
    shrink = min(1.0, THUMBNAIL / max(shown.shape[1:]))
    if shrink < 1:
        shown = fit(shown, [max(1, round(side * shrink)) for side in shown.shape[1:]])
    return encode_png((to_rgb(shown) * 255).round().to(torch.uint8).contiguous()).numpy().tobytes()


def make_grid_of_samples(originals: Sequence[Any], seen: torch.Tensor) -> torch.Tensor:
    """A row of `originals` (C, H, W), uint8, over a row of `seen` (N, C, H, W), stretched to its range."""
    from torchvision.utils import make_grid

    above = [fit(original.float() / 255, seen.shape[-2:]) for original in originals]
    rows = torch.cat([torch.stack(above), stretch(seen)])
    return (make_grid(to_rgb(rows), nrow=len(seen), pad_value=1.0) * 255).round().to(torch.uint8)


def fit(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A float image (C, H, W) in that size (height, width)."""
    return interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def stretch(images: torch.Tensor) -> torch.Tensor:
    """Float images of any range from 0 to 1."""
    low, high = images.min(), images.max()
    return (images - low) / (high - low).clamp(min=1e-8)


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Images (..., C, H, W) with three channels: of one it is repeated, of another number the mean of all is shown."""
    if images.shape[-3] == 3:
        return images
    return images.mean(-3, keepdim=True).expand(*images.shape[:-3], 3, *images.shape[-2:])
