"""Write a pack: a smaller copy of a data set of image files, which loads faster. Train on it with --data-dir.

    python tools/pack.py --output data-packed                # JPEG files of at most 448 pixels per shorter side
    python tools/pack.py --output data-raw --raw             # one file of pixels: larger, and several times as fast
    python train.py --data-dir data-packed

Names, classes, groups and official splits are those of the source, so split files stay valid. An interrupted pack is
continued by the same command. train.py and all tools reject a pack that is not finished, was edited, or whose source
has changed since.
"""

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from batteries.core.command_line import run_command
from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.core.validators import Count, Range, check_ranges
from batteries.data.cropping import Box, draw_box, resized_crop
from batteries.data.dataset import dataset_info
from batteries.data.image_decoding import decode_file
from batteries.data.packing import (
    check_output,
    estimate_bytes,
    lossless_side,
    make_record,
    pack_image,
    prepare_output,
    write_pack,
)
from batteries.data.packs import FileDataset, PackRecord, image_paths, is_pack
from experiment import augmentations
from experiment.dataset import load_dataset

SIZE = getattr(augmentations, "SIZE", 224)  # pixels per side of the input of the model
SCALE = getattr(augmentations, "SCALE", (0.25, 1.0))  # of random resized crops
RATIO = (3 / 4, 4 / 3)
LOSSLESS_SIDE = lossless_side(SIZE, SCALE)
COMPARED = 32  # images whose quality and loading are measured


@dataclass(frozen=True)
class Config:
    """Write a smaller copy of an image data set, which loads faster."""

    output: Path  # directory of the pack
    data_dir: Path = Path("data")  # directory of the data set
    side: Count = LOSSLESS_SIDE  # the shorter side of larger images becomes this many pixels; others stay as they are
    quality: Annotated[int, Range(1, 100)] = 90  # of JPEG
    raw: bool = False  # pixels instead of JPEG files
    overwrite: bool = False  # replace an existing pack
    threads: Count = os.cpu_count() or 1  # that decode, resize and encode

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Measured:
    """Means over some images.

    Attributes:
        psnr: Of crops from the pack compared with those from the source, in dB; infinite if they are equal.
        before: The seconds to load and crop an image of the source.
        after: The same in the pack.
    """

    psnr: float
    before: float
    after: float


def main(config: Config) -> None:
    """Write the pack and print what it changes."""
    torch.set_num_threads(1)  # the threads work on different images
    dataset = open_source(config)
    record = make_record(dataset, config.side, None if config.raw else config.quality)
    check_output(config.output, record, overwrite=config.overwrite)
    check_space(config.output, dataset, record)
    if config.side < LOSSLESS_SIDE:
        psnr = measure(dataset, None, record).psnr
        print(
            f"warning: --side {config.side} is less than {LOSSLESS_SIDE}, so small crops lose detail: the PSNR of "
            f"crops of {SIZE} pixels is {psnr:.1f} dB."
        )
    prepare_output(config.output, record, overwrite=config.overwrite)
    record = write_pack(dataset, config.output, record, config.threads, show_progress)
    print_table(config, dataset, record)


def open_source(config: Config) -> FileDataset:
    """Return the data set. Raises UserError if it does not consist of image files."""
    if is_pack(config.data_dir):
        raise UserError(f"--data-dir {config.data_dir} is a pack itself; pack the original data.")
    dataset: Any = load_dataset(config.data_dir)
    if dataset_info(dataset).read_image is None or not hasattr(dataset, "data_dir"):
        raise UserError(
            f"{type(dataset).__name__} in experiment/dataset.py cannot be packed: it needs read_image, data_dir, and "
            "ids or paths that are those of image files in data_dir."
        )
    if dataset_info(dataset).targets is None:
        raise UserError(
            f"{type(dataset).__name__} in experiment/dataset.py cannot be packed: its targets are files too, such as "
            "masks, which would keep their size."
        )
    return dataset


def check_space(output: Path, dataset: FileDataset, record: PackRecord) -> None:
    """Raise UserError if the disk has not enough space for the rest of the pack, or for the one that replaces it."""
    from rich.filesize import decimal

    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    needed = estimate_bytes(dataset, record) - written
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.is_dir())).free
    if needed > free:
        raise UserError(
            f"--output {output} needs about {decimal(needed)}, and the disk has {decimal(free)} free; make space, or "
            "use another --output or a smaller --side."
        )


def show_progress(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Show a progress bar in a terminal."""
    import sys

    from rich.progress import track

    return iter(track(items, "images", total=count, transient=True, disable=not sys.stdout.isatty()))


def measure(dataset: FileDataset, packed: Any | None, record: PackRecord) -> Measured:
    """Compare crops of the source with those of the pack.

    Args:
        dataset: The source.
        packed: The pack; None if it does not exist yet. Its images are then made here, and `after` is the time of that.
        record: The record of the pack.
    """
    generator = random.Random(0)
    indices = np.linspace(0, len(dataset) - 1, min(COMPARED, len(dataset))).astype(int).tolist()
    errors, before, after = [], [], []
    for index in indices:
        image, seconds = timed(lambda index=index: dataset[index][0])
        small, seconds_after = timed(lambda index=index: open_packed(dataset, packed, index, record))
        random.seed(generator.random())
        box = draw_box(image.shape[-2], image.shape[-1], SCALE, RATIO)
        crop, crop_seconds = timed(lambda image=image, box=box: resized_crop(image, box, SIZE))
        scaled = scale_box(box, image.shape, small.shape)
        small_crop, crop_seconds_after = timed(lambda small=small, scaled=scaled: resized_crop(small, scaled, SIZE))
        errors.append((crop.float() - small_crop.float()).square().mean().item())
        before.append(seconds + crop_seconds)
        after.append(seconds_after + crop_seconds_after)
    error = float(np.mean(errors))
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return Measured(psnr, float(np.median(before)), float(np.median(after)))


def open_packed(dataset: FileDataset, packed: Any | None, index: int, record: PackRecord) -> torch.Tensor:
    """Return an image (C, H, W) of the pack, which is made if the pack does not exist yet."""
    if packed is not None:
        return packed[index][0]
    image = pack_image(dataset, index, record)
    return decode_file(image, "RGB") if isinstance(image, bytes) else torch.from_numpy(image).permute(2, 0, 1)


def scale_box(box: Box, size: torch.Size, new_size: torch.Size) -> Box:
    """Return the box at the same place of an image of another size, both (C, H, W)."""
    vertical, horizontal = new_size[-2] / size[-2], new_size[-1] / size[-1]
    top, left = round(box.top * vertical), round(box.left * horizontal)
    bottom, right = round((box.top + box.height) * vertical), round((box.left + box.width) * horizontal)
    return Box(top, left, max(1, bottom - top), max(1, right - left))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a function, and how long it took in seconds."""
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def print_table(config: Config, dataset: FileDataset, record: PackRecord) -> None:
    """Print the size, the quality and the speed before and after."""
    from rich.filesize import decimal

    packed = load_dataset(config.output)
    measured = measure(dataset, packed, record)
    size = sum((dataset.data_dir / name).stat().st_size for name in image_paths(dataset))
    quality = "equal" if math.isinf(measured.psnr) else f"{measured.psnr:.1f} dB"
    print(f"{config.output}: {count_of(record.images, 'image')}, {record.kind}, PSNR of crops {quality}")
    print(f"{'':20}{'before':>12}{'after':>12}{'ratio':>8}")
    print(f"{'size':20}{decimal(size):>12}{decimal(record.bytes):>12}{record.bytes / size:>8.2f}")
    before, after = 1000 * measured.before, 1000 * measured.after
    print(f"{'ms to load an image':20}{before:>12.2f}{after:>12.2f}{after / before:>8.2f}")
    print(f"Train on it with --data-dir {config.output}.")


if __name__ == "__main__":
    run_command(main, Config, repeats=False)
