"""Mixing of the samples of a batch."""

from collections.abc import Callable

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
