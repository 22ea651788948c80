"""Predictions of a trained run: from a run directory and a split to a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from batteries.checkpoint.io import apply_checkpoint, read_checkpoint, scored_weights
from batteries.core.errors import UserError
from batteries.core.text import count_of
from batteries.data.dataset import Dataset, Samples, Transform, dataset_info
from batteries.data.fingerprint import fingerprint
from batteries.data.image_decoding import IMAGE_SUFFIXES
from batteries.data.image_files import ImageFiles
from batteries.data.loaders import EvalLoader
from batteries.data.splits import Split, SplitFile
from batteries.distributed.collectives import interleave_over_ranks, run_on_rank_zero
from batteries.evaluation.label_analysis import stored_threshold
from batteries.evaluation.predictions import KIND_NAMES, Kind, Predictions
from batteries.evaluation.run_selection import find_checkpoint, read_config
from batteries.evaluation.tta import Views, make_views
from batteries.training.precision import Precision, autocast
from batteries.training.setup import SetupConfig
from batteries.training.wrap import eval_mode


class InferenceStage(Protocol):
    """The options of a stage that inference reads."""

    @property
    def name(self) -> str: ...
    @property
    def image_size(self) -> int | None: ...


class InferenceConfig(SetupConfig, Protocol):
    """The options of train.py that inference reads."""

    @property
    def stages(self) -> Sequence[InferenceStage]: ...
    @property
    def data_dir(self) -> Path: ...
    @property
    def split_file(self) -> Path: ...
    @property
    def fold(self) -> int: ...
    @property
    def minimize_metric(self) -> bool: ...
    @property
    def valid_batch_size(self) -> int: ...
    @property
    def precision(self) -> Precision: ...


ConfigT = TypeVar("ConfigT", bound=InferenceConfig)


class Task(Protocol):
    """What inference reads of experiment/task.py."""

    @property
    def PREDICTIONS(self) -> str: ...  # noqa: N802 (a constant of a module): a Kind, or "mask"
    @property
    def to_predictions(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


@dataclass(frozen=True)
class Experiment:
    """What inference reads of experiment/."""

    make_folds: Callable[[Any], np.ndarray]
    build_model: Callable[..., nn.Module]
    task: Task
    normalize: Callable[[torch.Tensor], torch.Tensor]
    valid_transform: Callable[[int | None], Transform | None]
    channels: int


@dataclass(frozen=True)
class InferenceOptions:
    """What to predict, and how. tools/predict.py documents each option."""

    stage: str | None = None
    checkpoint: str = "best"
    split: Literal["valid", "test", "all"] = "all"
    images: Path | None = None
    tta: Views = "none"
    batch_size: int | None = None
    num_workers: int | None = None


def run_config(folder: Path, config_class: type[ConfigT], device: str, data_dir: Path | None) -> ConfigT:
    """Read the Config of a run, for inference on `device`; another `data_dir` replaces that of the run."""
    config: Any = replace(read_config(folder, config_class), device=device, data_parallel=False, compile=False)  # type: ignore[type-var]
    return config if data_dir is None else replace(config, data_dir=data_dir)


def find_stage(stages: Sequence[Any], name: str) -> Any:
    """Return the stage with this name; the last one if a checkpoint comes from elsewhere."""
    return next((stage for stage in stages if stage.name == name), stages[-1])


def load_split(dataset: Dataset, config: InferenceConfig, make_folds: Callable[[Any], np.ndarray]) -> Split:
    """Return the indices of the run's fold, as train.py selects them."""
    return SplitFile(config.split_file, dataset, make_folds).select(config.fold)


def check_training_data(
    folder: Path, checkpoint: Mapping[str, Any], dataset: Dataset, split: Split, data_dir: Path
) -> None:
    """Raise UserError if a checkpoint was trained on different data: a validation sample could be a training sample."""
    trained_on = (checkpoint.get("resume") or {}).get("data")
    if trained_on is not None and trained_on != fingerprint(dataset.fingerprint(), *split):
        raise UserError(
            f"--run {folder} was trained on different data, or on a different split of the data, than {data_dir} has "
            "now; give the original --data-dir, or train it again."
        )


def open_images(source: Path, dataset: Dataset, channels: int) -> ImageFiles:
    """Open images outside the data set, which are read as the data set reads its own; print what is left out.

    Args:
        source: A directory, or a table with a column `path`.
        dataset: The data set.
        channels: The channels of an image, if the data set has no reader of files.
    """
    info = dataset_info(dataset)
    files = ImageFiles(source, channels, info.read_image, info.suffixes or IMAGE_SUFFIXES)
    if files.left_out:
        run_on_rank_zero(lambda: print(f"left out {files.left_out}"))
    return files


def predict_run(
    folder: Path,
    config: InferenceConfig,
    dataset: Dataset,
    device: torch.device,
    experiment: Experiment,
    options: InferenceOptions,
) -> dict[str, Predictions]:
    """Predict with one run. Every rank must call it.

    Args:
        folder: The run directory.
        config: The output of `run_config`.
        dataset: The data set of the run.
        device: The device of this process.
        experiment: The user's functions.
        options: What to predict.

    Returns:
        The predictions by the name of the split, or of the directory of images.

    Raises:
        UserError: If there is no checkpoint, the data differ, or the split is empty.
    """
    split = load_split(dataset, config, experiment.make_folds)
    loaded = load_model(folder, config, dataset, split, device, experiment, options)
    model = loaded.model
    transform = experiment.valid_transform(loaded.image_size)
    batch_size = options.batch_size or config.valid_batch_size

    def predict(source: Samples, indices: np.ndarray) -> Predictions:
        loader = EvalLoader(source, indices, transform, device, batch_size=batch_size, num_workers=options.num_workers)
        values, targets = predict_loader(model, loader, options.tta, config.precision, experiment)
        if values.shape[1] != len(dataset.classes):
            raise UserError(
                f"the model returns {count_of(values.shape[1], 'output')} per sample, but the data set has "
                f"{count_of(len(dataset.classes), 'class')}; build_model in experiment/model.py must return one output "
                "for each class."
            )
        ids = tuple(str(source.ids[index]) for index in indices)
        kind = find_kind(experiment.task)
        known_targets = known_or_none(targets, kind, values.shape)
        threshold = loaded.threshold if kind == "labels" else None
        return Predictions(str(folder), ids, tuple(dataset.classes), values, known_targets, kind, threshold)

    if options.images is not None:
        files = open_images(options.images, dataset, experiment.channels)
        return {options.images.resolve().stem: predict(files, np.arange(len(files)))}
    return {name: predict(dataset, indices) for name, indices in select_indices(split, options.split).items()}


def select_indices(split: Split, wanted: str) -> dict[str, np.ndarray]:
    """Return the samples of the splits `wanted` (valid, test or all), by split. Raises UserError if there are none."""
    indices_of = {"valid": split.valid, "test": split.test}
    found = {name: indices for name, indices in indices_of.items() if wanted in (name, "all") and len(indices)}
    if not found:
        raise UserError(f"--split {wanted} is empty in this data set; use --split valid, or --images.")
    return found


def find_kind(task: Task) -> Kind:
    """Return what a table of predictions has. Raises UserError if PREDICTIONS is not valid."""
    for kind in KIND_NAMES:
        if kind == task.PREDICTIONS:
            return kind
    raise UserError(
        f"PREDICTIONS in experiment/task.py is {task.PREDICTIONS!r}; use {', '.join(map(repr, KIND_NAMES))} or 'mask'."
    )


def known_or_none(targets: np.ndarray, kind: Kind, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the targets of a table in the form of `Predictions`.

    Args:
        targets: What the data set returned, shape (N,) or (N, C).
        kind: What is predicted.
        shape: The shape of the predictions, (N, C).

    Returns:
        The targets; None if one of them is not known, or is not of this kind, such as a vector instead of one class.
    """
    if kind == "class":
        is_class = targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
        return targets if is_class and (targets >= 0).all() else None
    if targets.size != np.prod(shape):
        return None
    targets = targets.reshape(shape)
    if kind == "numbers":
        return targets.astype(np.float64) if np.isfinite(targets).all() else None
    return targets.astype(np.int64) if np.isin(targets, (0, 1)).all() else None


class LoadedModel(NamedTuple):
    """A trained model.

    Attributes:
        model: The model on its device.
        image_size: The image size of its stage; None for the default.
        threshold: The threshold of labels that was chosen on validation; None if there is none.
    """

    model: nn.Module
    image_size: int | None
    threshold: float | None


def load_model(
    folder: Path,
    config: InferenceConfig,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    experiment: Experiment,
    options: InferenceOptions,
) -> LoadedModel:
    """Load the model with the weights of the chosen checkpoint."""
    stages = [stage.name for stage in config.stages]
    path = run_on_rank_zero(
        lambda: find_checkpoint(folder, stages, options.stage, options.checkpoint, minimize=config.minimize_metric)
    )
    checkpoint = run_on_rank_zero(lambda: read_checkpoint(path))
    check_training_data(folder, checkpoint, dataset, split, config.data_dir)
    model = experiment.build_model(**{**checkpoint.get("model_args", {}), "num_classes": len(dataset.classes)})
    apply_checkpoint({"model_state_dict": scored_weights(checkpoint)}, str(path), model)
    run_on_rank_zero(lambda: print(f"weights  {path}, epoch {checkpoint.get('epoch')}"))
    return LoadedModel(
        model=model.to(device),
        image_size=find_stage(config.stages, checkpoint["stage"]).image_size,
        threshold=stored_threshold(checkpoint.get("metrics") or {}),
    )


def predict_loader(
    model: nn.Module, loader: EvalLoader, tta: Views, precision: Precision, experiment: Experiment
) -> tuple[np.ndarray, np.ndarray]:
    """Predict every sample of a loader once, in order. Every rank must call it.

    Returns:
        Predictions (N, classes), float64, and targets (N, ...), equal on all ranks. The targets come with the images,
        because a data set need not know those of an official test split in advance.

    Raises:
        UserError: If a prediction is not one number per class.
    """
    batches = []
    with eval_mode(model) as network, autocast(loader.device, precision):
        for images, targets in loader:
            views = [
                experiment.task.to_predictions(network(experiment.normalize(view)).cpu().double())
                for view in make_views(images, tta)
            ]
            if views[0].ndim != 2:
                raise UserError(
                    f"the output of the model has shape {tuple(views[0].shape[1:])} per sample, and a table of "
                    "predictions has one number per class; PREDICTIONS in experiment/task.py is 'mask' for masks."
                )
            batches.append((torch.stack(views).mean(0).numpy(), targets.cpu().numpy()))
    values, targets = map(np.concatenate, zip(*interleave_over_ranks(batches), strict=True))
    assert len(values) == loader.size, f"{len(values)} samples instead of {loader.size}"
    return values, targets
