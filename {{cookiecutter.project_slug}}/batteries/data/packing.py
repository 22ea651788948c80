"""Writing packs: images are made smaller, by threads, in the order of the data set."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from batteries.core.errors import UserError
from batteries.core.files import is_disk_full, write_atomically, write_text
from batteries.data.packs import (
    INDEX,
    PACK,
    PIXELS,
    UNFINISHED,
    FileDataset,
    PackRecord,
    hash_files,
    hash_source,
    image_paths,
    index_arrays,
    is_pack,
    pack_files,
    read_record,
)

RESIZE = "the shorter side of a larger image becomes the given side, bilinear with antialiasing"
SHAPES = "shapes.bin"  # of the images that an unfinished raw pack holds
SAMPLES = 16  # images from which the size of a pack is estimated
MARGIN = 1.1  # of the estimate
WINDOW = 256  # images that are in work at a time

Track = Callable[[Iterator[Any], int], Iterator[Any]]


def make_record(dataset: FileDataset, side: int, quality: int | None) -> PackRecord:
    """Return the record of a pack that does not exist yet; without a quality, of a raw one."""
    versions = {name: version(name) for name in ("torch", "torchcodec", "torchvision")}
    kind = "raw" if quality is None else "jpeg"
    source = str(dataset.data_dir.resolve())
    return PackRecord(kind, side, quality, source, hash_source(dataset), RESIZE, versions)


def lossless_side(size: int, scale: tuple[float, float]) -> int:
    """Return the side from which a pack loses no detail: no square crop is enlarged.

    Args:
        size: Height and width of crops, in pixels.
        scale: The least and the greatest fraction of the area of an image that they have.
    """
    return math.ceil(size / math.sqrt(scale[0]))


def shrink(image: torch.Tensor, side: int) -> torch.Tensor:
    """Resize an image (C, H, W), uint8, so that its shorter side is `side`; a smaller image is returned unchanged."""
    height, width = image.shape[-2:]
    if min(height, width) <= side:
        return image
    scale = side / min(height, width)
    size = [side if length == min(height, width) else round(length * scale) for length in (height, width)]
    return functional.resize(image[None], size, antialias=True)[0]


def encode_jpeg(image: torch.Tensor, quality: int) -> bytes:
    """Encode an image (C, H, W), uint8, with one or three channels, as a JPEG file."""
    from torchcodec.encoders import JpegEncoder  # type: ignore[attr-defined]

    return JpegEncoder(image.contiguous()).to_tensor(quality=quality).numpy().tobytes()


def pack_image(dataset: FileDataset, index: int, record: PackRecord) -> bytes | np.ndarray:
    """Return one image of a pack: the bytes of its file, or the pixels (H, W, C) in a raw pack."""
    path = dataset.data_dir / image_paths(dataset)[index]
    image = dataset.read_image(path)
    small = shrink(image, record.side)
    if record.quality is None:
        return np.ascontiguousarray(small.permute(1, 2, 0).numpy())
    return path.read_bytes() if small is image else encode_jpeg(small, record.quality)


def estimate_bytes(dataset: FileDataset, record: PackRecord) -> int:
    """Estimate the size of a pack in bytes from a few images."""
    indices = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).astype(int).tolist()
    packed = [pack_image(dataset, index, record) for index in indices]
    sizes = [image.nbytes if isinstance(image, np.ndarray) else len(image) for image in packed]
    return round(MARGIN * np.mean(sizes) * len(dataset))


def check_output(output: Path, record: PackRecord, *, overwrite: bool) -> None:
    """Raise UserError if a pack cannot be written to a directory. Nothing is changed.

    Args:
        output: The directory.
        record: The record of the pack.
        overwrite: Whether a finished or a different pack in the directory may be replaced.
    """
    source, target = Path(record.source), output.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise UserError(
            f"--output {output} and --data-dir {source} must not contain one another; give another --output."
        )
    if is_pack(source):
        raise UserError(f"--data-dir {source} is a pack itself; pack the original data.")
    if around := next((parent for parent in target.parents if is_pack(parent)), None):
        raise UserError(f"--output {output} is in the pack {around}, which must not be edited; give another --output.")
    if is_pack(output):
        found = _read_record(output)
        if not overwrite and not _is_same(found, record):
            raise UserError(
                f"--output {output} is a pack with {_describe_difference(found, record)}; give another --output, or "
                "replace it with --overwrite."
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not a pack; give another --output.")


def prepare_output(output: Path, record: PackRecord, *, overwrite: bool) -> None:
    """Create the directory of a pack; `overwrite` deletes a pack in it, except an unfinished part of the same one."""
    if is_pack(output) and overwrite and ((output / PACK).is_file() or not _is_same(_read_record(output), record)):
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be created ({error.strerror}); give another --output.") from None


def _read_record(output: Path) -> PackRecord:
    return read_record(output / (PACK if (output / PACK).is_file() else UNFINISHED))


def _is_same(found: PackRecord, record: PackRecord) -> bool:
    """Return whether two records are of the same pack, finished or not."""
    return replace(found, files="", images=0, bytes=0) == record


def _describe_difference(found: PackRecord, record: PackRecord) -> str:
    for name, text in (("kind", "another kind"), ("side", "another --side"), ("quality", "another --quality")):
        if (old := getattr(found, name)) != (new := getattr(record, name)):
            return f"{text} ({old} instead of {new})"
    if found.source != record.source:
        return f"another source ({found.source})"
    return "an older state of the data" if found.source_files != record.source_files else "other library versions"


def write_pack(dataset: FileDataset, output: Path, record: PackRecord, threads: int, track: Track) -> PackRecord:
    """Write a pack, or the rest of one that was interrupted, and return its complete record.

    Args:
        dataset: The source.
        output: The directory, as `prepare_output` left it.
        record: The record without the hash of the files.
        threads: The number of threads.
        track: Shows the progress of an iterator of a known length.

    Raises:
        UserError: If an image cannot be read, or the disk is full. The same command continues the pack.
    """
    if (output / PACK).is_file():
        return read_record(output / PACK)
    try:
        write_text(output / UNFINISHED, record.to_json())
        write = _write_raw if record.kind == "raw" else _write_jpeg
        write(dataset, output, record, threads, track)
        names = pack_files(record, dataset)
        size = sum((output / name).stat().st_size for name in names)
        if hasattr(os, "sync"):
            os.sync()  # once, because flushing each file takes longer than making it
        record = replace(record, files=hash_files(output, names), images=len(dataset), bytes=size)
        write_text(output / PACK, record.to_json())
    except OSError as error:
        if not is_disk_full(error):
            raise
        command = record.command(output)
        raise UserError(
            f"{output} cannot be written: the disk is full; make space and continue with: {command}"
        ) from None
    for name in (UNFINISHED, SHAPES):
        (output / name).unlink(missing_ok=True)
    return record


def _write_jpeg(dataset: FileDataset, output: Path, record: PackRecord, threads: int, track: Track) -> None:
    """Write the files of a JPEG pack that do not exist yet, and copy the tables."""

    def pack(index: int) -> None:
        target = output / image_paths(dataset)[index]
        if not target.exists():
            data = pack_image(dataset, index, record)
            assert isinstance(data, bytes)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_in_one_step(target, data)

    for _ in track(_in_order(pack, range(len(dataset)), threads), len(dataset)):
        pass
    for name in getattr(dataset, "tables", ()):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        write_in_one_step(output / name, (dataset.data_dir / name).read_bytes())


def write_in_one_step(path: Path, data: bytes) -> None:
    """Write a file that a killed process leaves complete or not at all; it is not flushed to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _write_raw(dataset: FileDataset, output: Path, record: PackRecord, threads: int, track: Track) -> None:
    """Append the missing images of a raw pack: first the pixels of an image, then its shape."""
    index_arrays(dataset, np.empty((0, 3), np.int64))  # raises before the first image is written
    with open(output / PIXELS, "ab") as pixels, open(output / SHAPES, "ab") as shapes:
        done = _truncate_to_complete(pixels, shapes, output / SHAPES)
        packed = _in_order(lambda index: pack_image(dataset, index, record), range(done, len(dataset)), threads)
        for image in track(packed, len(dataset) - done):
            pixels.write(image.data)
            pixels.flush()
            shapes.write(np.array(image.shape, np.int64).tobytes())
            shapes.flush()
    table = np.fromfile(output / SHAPES, np.int64).reshape(-1, 3)
    arrays: dict[str, Any] = index_arrays(dataset, table)
    write_atomically(output / INDEX, lambda file: np.savez(file, **arrays))


def _truncate_to_complete(pixels: BinaryIO, shapes: BinaryIO, file: Path) -> int:
    """Cut both files after the last complete image, and return the number of images."""
    table = np.fromfile(file, np.int64)
    table = table[: len(table) // 3 * 3].reshape(-1, 3)
    ends = np.cumsum(np.prod(table, 1))
    done = int(np.searchsorted(ends, pixels.tell(), side="right"))
    pixels.truncate(int(ends[done - 1]) if done else 0)
    shapes.truncate(done * table.itemsize * 3)
    return done


def _in_order(function: Callable[[int], Any], indices: Sequence[int], threads: int) -> Iterator[Any]:
    """Call a function for each index in threads; yield the results in order, with few in memory."""
    pending = iter(indices)
    with ThreadPoolExecutor(threads) as pool:
        while window := list(islice(pending, WINDOW)):
            yield from pool.map(function, window)
