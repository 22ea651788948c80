"""Predicted masks of one or several trained models: from images to PNG files and a table."""

import filecmp
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from batteries.core.errors import UserError
from batteries.core.files import write_text
from batteries.core.ranks import rank, world_size
from batteries.core.text import list_first
from batteries.data.dataset import Samples, Transform
from batteries.data.loaders import EvalLoader
from batteries.data.masks import encode_mask, encode_runs
from batteries.distributed.collectives import gather_over_ranks, run_on_rank_zero
from batteries.evaluation.inference import Experiment
from batteries.evaluation.mask_table import MaskTable
from batteries.evaluation.tta import Views, make_views, undo_views
from batteries.metrics.masks import PixelCounts, count_pixels
from batteries.training.precision import Precision, autocast
from batteries.training.wrap import eval_mode


@dataclass(frozen=True)
class KeepOriginal:
    """A transform that keeps the size of the image, and its mask in that size, as the target.

    Masks of a batch differ in size and cannot be stacked, so they are passed as bytes.
    """

    transform: Transform | None

    def __call__(self, image: Any, target: Any) -> tuple[Any, tuple[int, int, bytes]]:
        """Return the transformed image, and (height, width, mask); the mask is empty if it is not known."""
        height, width = image.shape[-2:]
        mask = bytes(target.to(torch.uint8).numpy().tobytes()) if target.ndim == 2 else b""
        transformed = image if self.transform is None else self.transform(image, target)[0]
        return transformed, (height, width, mask)


class Member(NamedTuple):
    """A model of an ensemble, with what it needs to predict."""

    model: nn.Module
    transform: Transform | None
    precision: Precision


class PredictedMask(NamedTuple):
    """The prediction of one image in its own size.

    Attributes:
        position: The position of the image among those that are predicted.
        probabilities: The probabilities, shape (C, H, W), float32.
        target: The mask, shape (H, W), uint8; None if it is not known.
    """

    position: int
    probabilities: torch.Tensor
    target: torch.Tensor | None

    @property
    def mask(self) -> torch.Tensor:
        """The most probable class of each pixel, shape (H, W)."""
        return self.probabilities.argmax(0)

    def confusion(self) -> np.ndarray:
        """Return the confusion matrix of the pixels (C, C); without a target, predicted classes in the first row."""
        classes = len(self.probabilities)
        target = torch.zeros_like(self.mask) if self.target is None else self.target
        return count_pixels(self.mask[None], target[None], classes)[0].numpy()


@dataclass(frozen=True)
class MaskOptions:
    """How masks are predicted and written."""

    tta: Views = "none"
    batch_size: int = 1
    num_workers: int | None = None
    probabilities: bool = False
    runs: bool = False
    overwrite: bool = False


def predict_masks(
    members: Sequence[Member],
    source: Samples,
    indices: np.ndarray,
    device: torch.device,
    experiment: Experiment,
    options: MaskOptions,
) -> Iterator[PredictedMask]:
    """Predict images of this rank: the mean of the probabilities of all members and views, in the size of the image.

    Each rank gets the batches r, r + world size, and so on.
    """
    size = options.batch_size
    loaders = [
        EvalLoader(
            source,
            indices,
            KeepOriginal(member.transform),
            device,
            batch_size=size,
            num_workers=options.num_workers,
        )
        for member in members
    ]
    with ExitStack() as stack:  # entered once: with DDP each entry synchronises the ranks, which differ in batches
        networks = [stack.enter_context(eval_mode(member.model)) for member in members]
        for number, batches in enumerate(zip(*loaders, strict=True)):
            outputs = [
                _predict_batch(network, images, member.precision, options.tta, experiment)
                for network, member, (images, _) in zip(networks, members, batches, strict=True)
            ]
            start = (number * world_size() + rank()) * size
            yield from _to_images(outputs, batches[0][1], start)


def _to_images(outputs: Sequence[torch.Tensor], originals: Any, start: int) -> Iterator[PredictedMask]:
    """Average the outputs of models (N, C, h, w) in the size of each image; `originals` comes from KeepOriginal."""
    heights, widths, masks = originals
    for row, (height, width, mask) in enumerate(zip(heights.tolist(), widths.tolist(), masks, strict=True)):
        parts = [_resize(output[row], height, width) for output in outputs]
        target = torch.frombuffer(bytearray(mask), dtype=torch.uint8).view(height, width) if mask else None
        yield PredictedMask(start + row, torch.stack(parts).mean(0), target)


class MaskJob(NamedTuple):
    """Images that the same models predict.

    Attributes:
        members: The models.
        indices: The images, as indices into the data set.
    """

    members: list[Member]
    indices: np.ndarray


def make_jobs(members: Sequence[Member], indices: Sequence[np.ndarray]) -> list[MaskJob]:
    """Group models by the images that they predict: of several folds, each predicts its validation split.

    Args:
        members: The models.
        indices: The images of each, as indices into the data set.

    Raises:
        UserError: If an image is in two splits that are not equal.
    """
    jobs: dict[bytes, MaskJob] = {}
    for member, images in zip(members, indices, strict=True):
        jobs.setdefault(images.tobytes(), MaskJob([], images)).members.append(member)
    everything = np.concatenate([job.indices for job in jobs.values()])
    if len(np.unique(everything)) < len(everything):
        raise UserError("the validation splits of these runs overlap without being equal; predict them one by one.")
    return list(jobs.values())


def write_masks(
    path: Path,
    jobs: Sequence[MaskJob],
    source: Samples,
    classes: Sequence[str],
    device: torch.device,
    experiment: Experiment,
    options: MaskOptions,
) -> MaskTable:
    """Predict the images of all jobs, and write their masks and the table `path`. Every rank must call it."""
    order = np.sort(np.concatenate([job.indices for job in jobs]))
    ids = [str(source.ids[index]) for index in order]
    writer = MaskWriter(path, ids, classes, probabilities=options.probabilities, runs=options.runs)
    for job in jobs:
        positions = np.searchsorted(order, job.indices)
        for predicted in predict_masks(job.members, source, job.indices, device, experiment, options):
            writer.add(int(positions[predicted.position]), predicted)
    return writer.publish(overwrite=options.overwrite)


def _predict_batch(
    network: nn.Module, images: torch.Tensor, precision: Precision, tta: Views, experiment: Experiment
) -> torch.Tensor:
    """Return the mean probabilities of all views of a batch, shape (N, C, H, W), on the CPU."""
    with torch.no_grad(), autocast(images.device, precision):
        views = [
            experiment.task.to_predictions(network(experiment.normalize(view)).float().cpu())
            for view in make_views(images, tta)
        ]
    if views[0].ndim != 4:
        raise UserError(
            f"the output of the model has shape {tuple(views[0].shape[1:])} per image; for masks, build_model in "
            "experiment/model.py must return one value for each class and pixel (C, H, W)."
        )
    return torch.stack(undo_views(views, tta)).mean(0)


def _resize(probabilities: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if probabilities.shape[-2:] == (height, width):
        return probabilities
    return functional.interpolate(probabilities[None], size=(height, width), mode="bilinear", antialias=False)[0]


def mask_names(ids: Sequence[str]) -> list[str]:
    """Return the name of the file of each mask: the id with the suffix .png in place of that of the image."""
    short = [str(PurePosixPath(name).with_suffix(".png")) for name in ids]
    is_unique = len(set(short)) == len(short)
    names = short if is_unique else [f"{name}.png" for name in ids]
    if outside := [name for name in names if ".." in PurePosixPath(name).parts or name.startswith("/")]:
        raise UserError(f"id {list_first(outside, 1)} is not a path below the directory of masks; rename it.")
    return names


class MaskWriter:
    """Writes the masks of a split into a draft directory; `publish` renames it.

    Args:
        path: The table, such as predictions/valid.csv; masks are written to predictions/valid/.
        ids: The ids of the images.
        classes: The names of the classes.
        probabilities: Also write the probabilities of each image, for blends.
        runs: Also write the run-length encoding of each class but the first.
    """

    def __init__(
        self, path: Path, ids: Sequence[str], classes: Sequence[str], *, probabilities: bool, runs: bool
    ) -> None:
        self.path = path
        self.ids = tuple(ids)
        self.classes = tuple(classes)
        self.names = mask_names(self.ids)
        self.directory = path.with_suffix("")
        self.draft = path.with_name(f".{path.stem}.tmp")
        self._writes_probabilities = probabilities
        self._writes_runs = runs
        self._rows: list[tuple[int, np.ndarray, bool, list[str]]] = []
        run_on_rank_zero(lambda: shutil.rmtree(self.draft, ignore_errors=True))

    def add(self, position: int, predicted: PredictedMask) -> None:
        """Write the files of one image, given by its position among `ids`."""
        mask = predicted.mask.to(torch.uint8).numpy()
        file = self.draft / self.names[position]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_mask(mask))
        if self._writes_probabilities:
            arrays: dict[str, Any] = {"probabilities": predicted.probabilities.half().numpy()}
            if predicted.target is not None:
                arrays["target"] = predicted.target.numpy()
            np.savez_compressed(_npz(file), **arrays)
        runs = [encode_runs(mask == number) for number in range(1, len(self.classes))] if self._writes_runs else []
        self._rows.append((position, predicted.confusion(), predicted.target is not None, runs))

    def publish(self, *, overwrite: bool) -> MaskTable:
        """Rename the draft to its final name, and write the table. Every rank must call it.

        Raises:
            UserError: If the directory exists with other files, and `overwrite` is false.
        """
        rows = sorted((row for rows in gather_over_ranks(self._rows) for row in rows), key=lambda row: row[0])
        assert [row[0] for row in rows] == list(range(len(self.ids))), "an image is missing, or there twice"
        table = self._make_table(np.stack([row[1] for row in rows]), is_known=all(row[2] for row in rows))
        run_on_rank_zero(lambda: self._finish(table, [row[3] for row in rows], overwrite))
        return table

    def _make_table(self, confusion: np.ndarray, *, is_known: bool) -> MaskTable:
        counts = PixelCounts(*(part.astype(np.int64) for part in PixelCounts.of(confusion)))
        files = [f"{self.directory.name}/{name}" for name in self.names]
        return MaskTable(
            path=self.path,
            ids=self.ids,
            classes=self.classes,
            masks=tuple(files),
            predicted=counts.predicted,
            counts=counts if is_known else None,
            probabilities=tuple(str(_npz(PurePosixPath(file))) for file in files) if self._writes_probabilities else (),
        )

    def _finish(self, table: MaskTable, runs: list[list[str]], overwrite: bool) -> None:
        if self.directory.exists() and not overwrite and not _are_equal(self.draft, self.directory):
            shutil.rmtree(self.draft)
            raise UserError(f"{self.directory} already exists with other files; give --overwrite, or another --output.")
        shutil.rmtree(self.directory, ignore_errors=True)
        os.replace(self.draft, self.directory)
        write_text(self.path, table.to_csv())
        if self._writes_runs:
            write_text(self.path.with_name(f"{self.path.stem}_rle.csv"), self._runs_to_csv(runs))

    def _runs_to_csv(self, runs: list[list[str]]) -> str:
        import pandas as pd

        rows = [
            (name, one, text)
            for name, texts in zip(self.ids, runs, strict=True)
            for one, text in zip(self.classes[1:], texts, strict=True)
        ]
        return pd.DataFrame(rows, columns=["id", "class", "rle"]).to_csv(index=False, lineterminator="\n")


def _npz(file: Any) -> Any:
    return file.with_suffix(".npz")


def _are_equal(first: Path, second: Path) -> bool:
    """Return whether two directories have the same files with the same bytes."""
    names = _files_in(first)
    is_same = names == _files_in(second)
    return is_same and all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


def _files_in(directory: Path) -> list[Path]:
    return sorted(file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
