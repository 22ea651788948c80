"""Averages of the weights of several checkpoints (SWA, Izmailov et al. 2018), and the choice of checkpoints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from batteries.checkpoint.io import read_checkpoint, scored_weights
from batteries.checkpoint.manifest import ManifestEntry, read_manifest
from batteries.core.errors import UserError
from batteries.core.text import summarize_names

State = dict[str, torch.Tensor]


def average_checkpoints(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Average the weights of checkpoints; the EMA weights of checkpoints that have them, because those were scored.

    Weights are averaged in float64 and rounded once, so the average of copies of one checkpoint is bit-identical to it.
    Counters and other integers are those of the first checkpoint. The running statistics of batch norm are averaged
    too, but they do not belong to the new weights: `estimate_batchnorm` replaces them.

    Args:
        paths: The files, one or more.

    Returns:
        The first checkpoint with the averaged weights, without optimizer, scheduler, scaler and EMA.

    Raises:
        UserError: If a checkpoint has other tensors than the first one; the message lists them.
    """
    first = read_checkpoint(Path(paths[0]))
    state = scored_weights(first)
    mean = start_mean(state)
    for count, path in enumerate(paths[1:], start=2):
        other = scored_weights(read_checkpoint(Path(path)))
        check_same_weights(str(paths[0]), state, str(path), other)
        update_mean(mean, other, count)
    return {
        **first,
        "model_state_dict": round_mean(mean, state),
        "optimizer_state_dict": None,
        "scheduler_state_dict": None,
        "ema_state_dict": None,
        "ema_steps": None,
        "scaler_state_dict": None,
    }


def start_mean(state: Mapping[str, torch.Tensor]) -> State:
    """Return the mean of one state: its tensors in float64 or complex128, and copies of its integers."""
    mean = {}
    for name, value in state.items():
        mean[name] = value.to(_wide_dtype(value)) if _has_mean(value) else value.clone()
    return mean


def update_mean(mean: State, state: Mapping[str, torch.Tensor], count: int) -> None:
    """Add one state to a running mean in place (Welford 1962); a state equal to the mean leaves it unchanged.

    Args:
        mean: The mean of `count` - 1 states.
        state: The next state.
        count: The number of states, including this one.
    """
    for name, value in mean.items():
        if _has_mean(value):
            value += (state[name] - value) / count


def round_mean(mean: State, like: Mapping[str, torch.Tensor]) -> State:
    """Return the mean with the dtypes of `like`."""
    return {name: value.to(like[name].dtype) for name, value in mean.items()}


def _has_mean(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _wide_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


def check_same_weights(
    first: str, expected: Mapping[str, torch.Tensor], second: str, state: Mapping[str, torch.Tensor]
) -> None:
    """Raise UserError if two states have different names, shapes or dtypes.

    Args:
        first: What the error calls the first checkpoint.
        expected: The weights of the first checkpoint.
        second: What the error calls the second checkpoint.
        state: The weights of the second checkpoint.
    """
    common = [name for name in expected if name in state]
    differences = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "different shape of": [name for name in common if state[name].shape != expected[name].shape],
        "different dtype of": [name for name in common if state[name].dtype != expected[name].dtype],
    }
    found = [f"{kind} {summarize_names('weight', names)}" for kind, names in differences.items() if names]
    if found:
        raise UserError(f"{second} is not a checkpoint of the same model as {first}: {'; '.join(found)}.")


def select_checkpoints(directory: Path, selection: Sequence[str], *, minimize: bool) -> list[Path]:
    """Select checkpoints of a stage.

    Args:
        directory: The directory of the stage.
        selection: Any of `best:5` (the five best in the manifest), `last:3` (the three newest), and paths.
        minimize: Whether a lower score is better.

    Returns:
        The files in the order of `selection`, each once: the best first, the newest first.

    Raises:
        UserError: If a path does not exist, or fewer than two files are selected.
    """
    entries = read_manifest(directory).entries
    selected: list[Path] = []
    for item in selection:
        selected += _select(directory, entries, item, minimize)
    files = list(dict.fromkeys(selected))
    if len(files) < 2:
        raise UserError(
            f"--checkpoints {' '.join(selection)} selects {len(files)} of {directory}, and an average needs two or "
            "more; train with a larger --save-n-best, or add paths."
        )
    return files


def _select(directory: Path, entries: Sequence[ManifestEntry], item: str, minimize: bool) -> list[Path]:
    kind, _, number = item.partition(":")
    if kind not in ("best", "last") or not number.isdecimal():
        path = Path(item)
        if not path.is_file():
            raise UserError(f"--checkpoints {item} is not a file; give best:5, last:3, or paths of checkpoints.")
        return [path]
    if kind == "last":
        newest_first = list(reversed(entries))
        return [directory / entry.file for entry in newest_first[: int(number)]]
    sign = 1 if minimize else -1
    scored = [(sign * entry.score, entry) for entry in entries if entry.score is not None]
    scored.sort(key=lambda pair: (pair[0], pair[1].epoch))
    return [directory / entry.file for _, entry in scored[: int(number)]]


def estimate_batchnorm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Estimate the batch norm statistics for the present weights: their mean over `batches`, read once.

    Uses update_bn of torch. Dropout is active, as in training. A model without batch norm reads no batch.

    Args:
        model: The model.
        batches: Inputs of the model, each (N, C, H, W).
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        update_bn(batches, model)  # type: ignore[arg-type]


def greedy_soup(
    candidates: Sequence[Path], score_of: Callable[[Sequence[Path]], float], *, minimize: bool
) -> tuple[list[Path], float]:
    """Choose checkpoints greedily: each candidate is added if the average with it has a better score.

    Wortsman et al. 2022, algorithm 1, except that the paper also adds a candidate that leaves the score equal. Here
    the score must improve, so that fewer files are chosen.

    Args:
        candidates: The files, ordered by their own scores, best first.
        score_of: Returns the score of the average of some files.
        minimize: Whether a lower score is better.

    Returns:
        The chosen files and their score.
    """
    chosen = [candidates[0]]
    best_score = score_of(chosen)
    for candidate in candidates[1:]:
        extended = [*chosen, candidate]
        score = score_of(extended)
        if is_better(score, best_score, minimize=minimize):
            chosen = extended
            best_score = score
    return chosen, best_score


def is_better(score: float, reference: float, *, minimize: bool) -> bool:
    """Return whether `score` is better than `reference`; NaN never is."""
    return score < reference if minimize else score > reference
