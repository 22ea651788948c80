"""Mixing of the samples of a batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchvision.transforms import v2

from batteries.data.dataset import Mixer


def make_mixer(mixup: float = 0.0, cutmix: float = 0.0, num_classes: int | None = None) -> Mixer | None:
    """Return a function that mixes a batch (images, targets), or None if both alphas are 0.

    Each sample is mixed with the one before it, by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019); if both have
    an alpha, one of them is drawn for each step, with equal probability.

    Args:
        mixup: The alpha of mixup.
        cutmix: The alpha of CutMix.
        num_classes: The number of classes of targets (N,), which become soft targets (N, num_classes). None for numbers
            (N,) or (N, K), which are mixed as they are, shape (N, 1) or (N, K).

    Returns:
        A function to mixed float images and targets.
    """
    mixers: list[Callable] = []
    if mixup > 0:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    if not mixers:
        return None
    mix = v2.Compose([v2.ToDtype(torch.float32), v2.RandomChoice(mixers)])
    if num_classes is not None:
        return mix
    return lambda images, targets: mix(images, targets.view(len(targets), -1).float())


@dataclass(frozen=True)
class MaskCutMix:
    """CutMix (Yun et al. 2019) of a batch (images, masks): a box comes from the sample before, in image and mask.

    Attributes:
        alpha: The parameter of the Beta distribution of the fraction of the area that stays.
    """

    alpha: float

    def __call__(self, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed images (N, C, H, W) and masks (N, H, W). The same box is drawn for the whole batch."""
        kept = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        height, width = images.shape[-2:]
        side = math.sqrt(1 - kept)
        rows = _interval(height, side)
        columns = _interval(width, side)
        mixed = []
        for part in (images, masks):
            changed = part.clone()
            changed[..., rows, columns] = part.roll(1, 0)[..., rows, columns]
            mixed.append(changed)
        return mixed[0], mixed[1]


def _interval(size: int, fraction: float) -> slice:
    """Draw an interval of `fraction` of `size` pixels, with its centre anywhere, limited to the image."""
    centre = int(torch.randint(size, ()))
    half = 0.5 * fraction * size
    return slice(max(0, int(centre - half)), min(size, int(centre + half)))
