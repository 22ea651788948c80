"""Average the weights of checkpoints of one model (Izmailov et al. 2018, SWA), and choose whose average is worth it."""

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
    """The checkpoint in the first of `paths` with the mean of the weights of all; no optimizer, no scheduler.

    Where a checkpoint has a moving average of its weights, that is what is averaged: it is what was scored.
    Weights are averaged in float64 and rounded once, so that copies of one checkpoint give its own bits. Counters and
    other whole numbers are the first's. Statistics of batch norm are averaged as well, which is not what they are for
    these weights: `renew_batchnorm` estimates them anew.
    Raises BadInput where a file has other weights than the first, with their names.
    """
    first = read_checkpoint(Path(paths[0]))
    state = scored_weights(first)
    mean = widen(state)
    for count, path in enumerate(paths[1:], start=2):
        other = scored_weights(read_checkpoint(Path(path)))
        check_same_weights(str(paths[0]), state, str(path), other)
        add_to_mean(mean, other, count)
    nothing = dict.fromkeys(("optimizer_state_dict", "scheduler_state_dict", "ema_state_dict", "scaler_state_dict"))
    return {**first, **nothing, "model_state_dict": narrow(mean, state)}


def widen(state: Mapping[str, torch.Tensor]) -> State:
    """A mean over one: float64, and complex128; whole numbers as they are."""
    return {name: value.to(_wide(value)) if _has_mean(value) else value.clone() for name, value in state.items()}


def add_to_mean(mean: State, state: Mapping[str, torch.Tensor], count: int) -> None:
    """Make `mean`, over count - 1, one over `count`, in place (Welford 1962): equal values leave it as it is."""
    for name, value in mean.items():
        if _has_mean(value):
            value += (state[name] - value) / count


def narrow(mean: State, like: Mapping[str, torch.Tensor]) -> State:
    """`mean` in the types of `like`."""
    return {name: value.to(like[name].dtype) for name, value in mean.items()}


def _has_mean(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _wide(value: torch.Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


def check_same_weights(
    first: str, wanted: Mapping[str, torch.Tensor], second: str, state: Mapping[str, torch.Tensor]
) -> None:
    """Raise BadInput where two states have other names, shapes or types."""
    differences = []
    if missing := [name for name in wanted if name not in state]:
        differences.append(f"{summarize_names('weight', missing)} missing")
    if extra := [name for name in state if name not in wanted]:
        differences.append(f"{summarize_names('weight', extra)} only there")
    both = [name for name in wanted if name in state]
    if shapes := [name for name in both if state[name].shape != wanted[name].shape]:
        differences.append(f"{summarize_names('weight', shapes)} of another shape")
    if types := [name for name in both if state[name].dtype != wanted[name].dtype]:
        differences.append(f"{summarize_names('weight', types)} of another type")
    if differences:
        raise UserError(f"{second} is not of the same model as {first}: {'; '.join(differences)}.")


def choose_files(folder: Path, wanted: Sequence[str], *, minimize: bool) -> list[Path]:
    """The checkpoints that `wanted` names: `best:5`, `last:3` of the ledger in `folder`, and paths.

    The best come first, the last newest first; none is named twice. Raises BadInput where fewer than two are left.
    """
    rows = read_manifest(folder)["rows"]
    found = [path for word in wanted for path in _find(folder, rows, word, minimize)]
    files = list(dict.fromkeys(found))
    if len(files) < 2:
        raise UserError(
            f"--checkpoints {' '.join(wanted)} are {len(files)} in {folder}, and an average needs two; "
            f"train with a larger --save-n-best, or name more."
        )
    return files


def _find(folder: Path, rows: Sequence[ManifestEntry], word: str, minimize: bool) -> list[Path]:
    kind, _, number = word.partition(":")
    if kind not in ("best", "last") or not number.isdecimal():
        path = Path(word)
        if not path.is_file():
            raise UserError(f"--checkpoints {word} is no file; give best:5, last:3, or paths of checkpoints.")
        return [path]
    if kind == "last":
        return [folder / row.file for row in reversed(rows)][: int(number)]
    scored = [row for row in rows if row.score is not None]
    sign = 1 if minimize else -1
    scored.sort(key=lambda row: (sign * (row.score or 0), row.epoch))
    return [folder / row.file for row in scored[: int(number)]]


def renew_batchnorm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Estimate the statistics of batch norm for these weights: their mean over `batches`, in one pass.

    torch's update_bn; dropout draws, as in training.
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        update_bn(batches, model)  # type: ignore[arg-type]


def greedy(
    candidates: Sequence[Path], score_of: Callable[[Sequence[Path]], float], *, minimize: bool
) -> tuple[list[Path], float]:
    """Wortsman et al. 2022, algorithm 1: from the best on, each joins where the average with it scores better.

    The paper lets a tie join; here the score has to rise, so that fewer files do. `candidates` are in order of their
    own scores. Gives those that joined and their score.
    """
    chosen, best = [candidates[0]], score_of(candidates[:1])
    for candidate in candidates[1:]:
        found = score_of([*chosen, candidate])
        if is_better(found, best, minimize=minimize):
            chosen, best = [*chosen, candidate], found
    return chosen, best


def is_better(one: float, other: float, *, minimize: bool) -> bool:
    """Whether score `one` is better than `other`; NaN never is."""
    return one < other if minimize else one > other
