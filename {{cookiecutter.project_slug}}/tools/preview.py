"""See what augmentation does: a sheet of samples as they are, as training sees them, and as a batch reaches the model.

    python tools/preview.py                                   # logs/preview.png
    python tools/preview.py --mixup 0.4 --sheet logs/mixed.png

What it shows is what training gets: the same order, the same random streams. A sheet that is there is replaced.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.files import write_output
from batteries.core.fonts import missing_letters_as_boxes
from batteries.core.validators import Count, NotNegative, Range, Seed, check_ranges
from batteries.data.image_grid import stretch, to_rgb
from batteries.data.loaders import TrainLoader
from batteries.data.splits import SplitFile, check_files
from experiment.augmentations import batch_transform, normalize, train_transform
from experiment.dataset import load_dataset
from experiment.splits import make_folds


@dataclass(frozen=True)
class Config:
    """Draw samples of the train split, before and after augmentation."""

    sheet: Path = Path("logs/preview.png")  # the picture; one that is there is replaced
    samples: Annotated[int, Range(2)] = 6  # rows
    epochs: Count = 4  # augmented versions of each, one from each of the first epochs
    data_dir: Path = Path("data")  # where data sets that are files are kept
    split_file: Path = Path("splits/default.csv")  # which samples train; not written here
    fold: int = 0  # which fold validates; the others are looked at
    seed: Seed = 0  # as in training
    batch_size: Count = 32  # as in training: a sample is mixed with one of its step
    mixup: NotNegative = 0.0  # alpha of mixup, as in training
    cutmix: NotNegative = 0.0  # alpha of cutmix, as in training

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        check_ranges(self)
        if self.samples > self.batch_size:
            raise UserError(
                f"--samples {self.samples} are drawn of one batch: use --batch-size {self.samples} or more."
            )
        if self.sheet.suffix != ".png":
            raise UserError(f"--sheet {self.sheet} must end in .png.")


def main(config: Config) -> None:
    """Load the samples as training does, draw, say the range of values."""
    dataset = load_dataset(config.data_dir)
    split = SplitFile(config.split_file, dataset, make_folds).select(config.fold)
    check_files(dataset, split)
    mixer = batch_transform(len(dataset.classes), config.mixup, config.cutmix)
    loader, mixed = (
        TrainLoader(
            *(dataset, split.train, train_transform(), torch.device("cpu")),
            seed=config.seed,
            batch_size=config.batch_size,
            drop_last=False,
            mixer=mixer,
        )
        for mixer in (None, mixer)
    )
    first = loader.epoch(0, 1)
    chosen = first.order[: config.samples]
    originals = [dataset[index][0] for index in chosen.tolist()]
    # The same samples stand elsewhere in other epochs, with streams of their own.
    versions = [look_up(loader, epoch, chosen) for epoch in range(1, config.epochs + 1)]
    _, images, targets = mixed.epoch(0, 1).peek(config.samples)
    seen = normalize(images)
    names = [f"{dataset.ids[index]}: {name_of(first.sample(index)[1], dataset)}" for index in chosen.tolist()]
    draw(config.sheet, originals, versions, seen, names, [name_of(target, dataset) for target in targets])
    print(f"a batch  {tuple(seen.shape)}, {seen.dtype}, {describe(seen)}")
    print(f"targets  {tuple(targets.shape)}, {targets.dtype}")
    print(f"look     {config.sheet}")


def look_up(loader: TrainLoader, epoch: int, chosen: Any) -> list[torch.Tensor]:
    """The samples `chosen`, by index, as training sees them in that epoch."""
    order = loader.epoch(0, epoch)
    return [order.sample(index)[0] for index in chosen.tolist()]


def draw(
    sheet: Path, originals: list, versions: list[list], seen: torch.Tensor, names: list[str], targets: list[str]
) -> None:
    """A row for each sample: as it is, augmented in each epoch, and as a batch reaches the model."""
    import matplotlib as mpl

    mpl.use("agg")  # no screen is needed
    import matplotlib.pyplot as plt

    columns = 2 + len(versions)
    figure, axes = plt.subplots(len(originals), columns, figsize=(2 * columns, 2.2 * len(originals)), squeeze=False)
    shown = stretch(seen)
    for row, image in enumerate(originals):
        pictures = [image / 255.0, *(version[row] / 255.0 for version in versions), shown[row]]
        titles = [names[row], *(f"epoch {epoch}" for epoch in range(1, columns - 1)), targets[row]]
        for place, picture, title in zip(axes[row], pictures, titles, strict=True):
            place.imshow(to_rgb(picture).permute(1, 2, 0).clamp(0, 1).numpy())
            place.set_title(wrap(title), fontsize=7, parse_math=False)
            place.axis("off")
    figure.suptitle(f"left: as it is; between: augmented; right: to the model, {describe(seen)}", fontsize=9)
    with missing_letters_as_boxes():
        figure.tight_layout()
        write_output(sheet, lambda file: figure.savefig(file, format="png", dpi=110), "--sheet")
    plt.close(figure)


def wrap(title: str) -> str:
    """A title in lines that fit over a picture, three at most."""
    return textwrap.fill(title, 28, max_lines=3, placeholder=" …")


def name_of(target: torch.Tensor, dataset: Any) -> str:
    """A target in words: a class, a number, the classes that a mixed one has with their shares, or a mask's size."""
    if target.ndim == 0:
        return f"{target:.4g}" if target.is_floating_point() else str(dataset.classes[int(target)])
    if target.ndim > 1:
        return " x ".join(map(str, target.shape))
    parts = [(float(share), name) for share, name in zip(target.tolist(), dataset.classes, strict=True) if share > 0]
    return " + ".join(f"{share:.2f} {name}" for share, name in sorted(parts, reverse=True))


def describe(values: torch.Tensor) -> str:
    """The range of values, their mean and deviation."""
    return f"{values.min():.2f} to {values.max():.2f}, mean {values.mean():.2f}, deviation {values.std():.2f}"


if __name__ == "__main__":
    run_command(main, Config, repeats=False)
