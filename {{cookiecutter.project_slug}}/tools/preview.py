"""Show what augmentation does: samples before and after it, and as input of the model, in one image.

    python tools/preview.py                                   # logs/preview.png
    python tools/preview.py --mixup 0.4 --sheet logs/mixed.png

The samples are exactly those of training: the same order and the same random streams. An existing image is replaced.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torchvision.transforms import v2

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.files import write_output
from batteries.core.fonts import ignore_missing_glyphs
from batteries.core.validators import Count, NotNegative, Range, Seed, check_ranges
from batteries.data.dataset import Dataset
from batteries.data.image_grid import overlay, stretch, to_rgb
from batteries.data.loaders import TrainLoader
from batteries.data.splits import Split, SplitFile, check_files
from batteries.data.targets import describe_target
from experiment.augmentations import normalize, train_transform
from experiment.dataset import load_dataset
from experiment.splits import make_folds
from experiment.task import batch_transform


@dataclass(frozen=True)
class Config:
    """Draw samples of the train split, before and after augmentation."""

    sheet: Path = Path("logs/preview.png")  # the image to write; an existing one is replaced
    samples: Annotated[int, Range(2)] = 6  # samples, one per row
    epochs: Count = 4  # augmented versions of each sample, from the first epochs
    data_dir: Path = Path("data")  # directory of the data set
    split_file: Path = Path("splits/default.csv")  # train, valid and test samples; not written by this command
    fold: int = 0  # the fold used for validation; the samples come from the others
    seed: Seed = 0  # as in training
    batch_size: Count = 32  # as in training; without --shards, a sample is mixed with one of its step
    shards: Count | None = None  # as in training; a sample is mixed with another one of its shard
    mixup: NotNegative = 0.0  # alpha of mixup, as in training
    cutmix: NotNegative = 0.0  # alpha of CutMix, as in training

    def __post_init__(self) -> None:
        """Validate the options."""
        check_ranges(self)
        if self.samples > self.batch_size:
            raise UserError(
                f"--samples {self.samples} must not exceed --batch-size {self.batch_size}, because they come from one "
                f"batch; use --batch-size {self.samples} or more."
            )
        if self.sheet.suffix != ".png":
            raise UserError(f"--sheet {self.sheet} must end in .png.")


def main(config: Config) -> None:
    """Load samples as training does, draw them, and print the range of their values."""
    dataset = load_dataset(config.data_dir)
    split = SplitFile(config.split_file, dataset, make_folds).select(config.fold)
    check_files(dataset, split)
    loader = make_loader(dataset, split, config, mixup=0.0, cutmix=0.0)
    mixed_loader = make_loader(dataset, split, config, mixup=config.mixup, cutmix=config.cutmix)
    first = loader.epoch(0, 1)
    chosen = first.order[: config.samples]
    originals = [show_sample(*dataset[index]) for index in chosen.tolist()]
    versions = [augmented_versions(loader, epoch, chosen) for epoch in range(1, config.epochs + 1)]
    _, images, targets = mixed_loader.epoch(0, 1).peek(config.samples)
    inputs = normalize(images)
    names = [f"{dataset.ids[index]}: {describe_target(first.sample(index)[1], dataset)}" for index in chosen.tolist()]
    input_names = [describe_target(target, dataset) for target in targets]
    shown_inputs = stretch(inputs)
    if targets.ndim == 3:
        shown_inputs = torch.stack(
            [overlay(to_rgb(image), mask) for image, mask in zip(shown_inputs, targets, strict=True)]
        )
    draw(config.sheet, originals, versions, shown_inputs, describe_values(inputs), names, input_names)
    print(f"augment  {describe_transform(train_transform())}; see experiment/augmentations.py")
    print(f"batch    {tuple(inputs.shape)}, {inputs.dtype}, {describe_values(inputs)}")
    print(f"targets  {tuple(targets.shape)}, {targets.dtype}")
    print(f"image    {config.sheet}")


def make_loader(dataset: Dataset, split: Split, config: Config, *, mixup: float, cutmix: float) -> TrainLoader:
    """Build the train loader, on the CPU."""
    return TrainLoader(
        dataset,
        split.train,
        train_transform(),
        torch.device("cpu"),
        seed=config.seed,
        batch_size=config.batch_size,
        shards=config.shards,
        drop_last=config.shards is not None,  # a short last step could have fewer samples than shards
        mixer=batch_transform(len(dataset.classes), mixup, cutmix),
    )


def augmented_versions(loader: TrainLoader, epoch: int, chosen: np.ndarray) -> list[torch.Tensor]:
    """Return the samples `chosen`, given by index, as training augments them in an epoch (from 1)."""
    batches = loader.epoch(0, epoch)
    return [show_sample(*batches.sample(index)) for index in chosen.tolist()]


def show_sample(image: Any, target: Any) -> torch.Tensor:
    """Return an image as floats from 0 to 1, shape (3, H, W), with its mask if the target is one."""
    shown = to_rgb(v2.functional.to_image(image) / 255.0)
    is_mask = isinstance(target, torch.Tensor) and target.ndim == 2 and target.shape == shown.shape[1:]
    return overlay(shown, target) if is_mask else shown


def draw(
    sheet: Path,
    originals: list[torch.Tensor],
    versions: list[list[torch.Tensor]],
    inputs: torch.Tensor,
    values: str,
    names: list[str],
    input_names: list[str],
) -> None:
    """Draw one row per sample: the original, its augmented version in each epoch, and the input of the model.

    Args:
        sheet: The PNG file to write.
        originals: N images (3, H, W), floats from 0 to 1.
        versions: For each epoch, N augmented images, as `originals`.
        inputs: The normalised images, stretched to 0 to 1, shape (N, C, H, W).
        values: The values of the inputs.
        names: The titles of the originals.
        input_names: The titles of the inputs.
    """
    import matplotlib as mpl

    mpl.use("agg")  # works without a display
    import matplotlib.pyplot as plt

    columns = 2 + len(versions)
    figure, axes = plt.subplots(len(originals), columns, figsize=(2 * columns, 2.2 * len(originals)), squeeze=False)
    for row, original in enumerate(originals):
        augmented = [version[row] for version in versions]
        images = [original, *augmented, inputs[row]]
        titles = [names[row], *[f"epoch {epoch}" for epoch in range(1, columns - 1)], input_names[row]]
        for axis, image, title in zip(axes[row], images, titles, strict=True):
            axis.imshow(to_rgb(image).permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set_title(wrap_title(title), fontsize=7, parse_math=False)
            axis.axis("off")
    figure.suptitle(f"left: original; middle: augmented; right: model input, {values}", fontsize=9)
    with ignore_missing_glyphs():
        figure.tight_layout()
        write_output(sheet, lambda file: figure.savefig(file, format="png", dpi=110), "--sheet")
    plt.close(figure)


def wrap_title(title: str) -> str:
    """Wrap a title to the width of an image, in at most three lines."""
    return textwrap.fill(title, 28, max_lines=3, placeholder=" …")


def describe_transform(transform: object) -> str:
    """List the steps of a transform with their parameters."""
    steps = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    return ", ".join(repr(step) for step in steps if step is not None) or "nothing"


def describe_values(values: torch.Tensor) -> str:
    """Describe the range, mean and standard deviation of values."""
    return f"{values.min():.2f} to {values.max():.2f}, mean {values.mean():.2f}, deviation {values.std():.2f}"


if __name__ == "__main__":
    run_command(main, Config, repeats=False)
