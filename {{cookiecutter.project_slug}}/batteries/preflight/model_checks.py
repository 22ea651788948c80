"""Checks of model, optimizer and checkpoint: does a batch get learned, do gradients arrive, does a state come back."""

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from batteries.checkpoint.async_writer import HostBuffers
from batteries.checkpoint.io import read_checkpoint, save_checkpoint
from batteries.core.text import list_first
from batteries.distributed.unwrap import unwrap_model
from batteries.preflight.results import CheckResult
from batteries.training.state import TrainState

LEARNED, HALF_LEARNED = 0.1, 0.5  # of the first loss
MOST_NAMED = 5  # parameters in a row of the table


class DryRun:
    """What train_fn and valid_fn ask of a run, without its folder: nothing is shown, logged or saved."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def track(self, batches: Iterable[Any], metrics: Any) -> Iterator[Any]:
        """The batches as they are."""
        return iter(batches)

    def log_step(self, lr: float, gradient_norm: torch.Tensor) -> None:
        """Nothing."""


def check_overfit_one_batch(losses: Iterable[float], samples: int, lr: float, *, knows: bool = False) -> CheckResult:
    """Whether the loss of one batch, trained on again and again, falls towards 0; it is over when it has fallen enough.

    `knows`: the first weights may know the samples already, so that there is little left to fall.
    """
    losses_so_far: list[float] = []
    for loss in losses:
        losses_so_far.append(loss)
        if not math.isfinite(loss) or loss <= LEARNED * losses_so_far[0]:
            break
    first, last = losses_so_far[0], losses_so_far[-1]
    words = f"loss {first:.3g} to {last:.3g} in {len(losses_so_far)} steps on the same {samples} samples, lr {lr:g}"
    if not math.isfinite(last):
        return CheckResult(
            "fail", f"{words}: not finite", "a smaller --stages.0.lr; look at loss and normalize for 0 / 0, log 0"
        )
    if last <= LEARNED * first:
        return CheckResult("pass", words)
    if last <= HALF_LEARNED * first or knows:
        return CheckResult("warning", f"{words}: it falls slowly", "another --stages.0.lr, or more --overfit-steps")
    hint = "do images, targets and loss belong together? do the optimizer's steps reach the model? is lr far off?"
    return CheckResult("fail", f"{words}: it does not learn them", hint)


class Seen(NamedTuple):
    """What the gradients of one parameter were in the steps so far."""

    moved: bool = False  # not zero in one of them
    finite: bool = True  # in all of them


def check_gradients(
    model: nn.Module, learning: Collection[str], train: Callable[[], object], *, scaled: bool
) -> CheckResult:
    """Whether every parameter of `learning`, by name, gets a gradient while `train` runs some steps.

    It must not be zero in all of them, and finite; where losses are `scaled` (fp16) the first ones may overflow.
    """
    losses_so_far: dict[str, Seen] = {}

    def watch(name: str) -> Callable[[torch.Tensor], None]:
        def look(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                before = losses_so_far.get(name, Seen())
                moved, finite = bool(gradient.any()), bool(gradient.isfinite().all())
                losses_so_far[name] = Seen(before.moved or moved, before.finite and finite)

        return look

    parameters = dict(unwrap_model(model).named_parameters())
    handles = [
        parameters[name].register_post_accumulate_grad_hook(watch(name)) for name in parameters if name in learning
    ]
    try:
        train()
    finally:
        for handle in handles:
            handle.remove()
    unreached = [name for name in parameters if name in learning and name not in losses_so_far]
    still = [name for name in parameters if name in losses_so_far and not losses_so_far[name].moved]
    endless = [name for name in parameters if name in losses_so_far and not losses_so_far[name].finite and not scaled]
    frozen = len(parameters) - len(learning)
    return _judge_gradients(len(learning), frozen, unreached, still, endless)


def _judge_gradients(
    count: int, frozen: int, unreached: list[str], still: list[str], endless: list[str]
) -> CheckResult:
    if unreached:
        losses_so_far = f"no gradient for {len(unreached)} of {count} parameters: {list_first(unreached, MOST_NAMED)}"
        return CheckResult(
            "fail", losses_so_far, "use them in forward, or remove or freeze them; DDP ends with an error for them"
        )
    if endless:
        losses_so_far = (
            f"gradients that are not finite, for {len(endless)} of {count}: {list_first(endless, MOST_NAMED)}"
        )
        return CheckResult(
            "fail", losses_so_far, "look for sqrt, log and division at 0 in model and loss; --precision fp32"
        )
    if still:
        losses_so_far = f"only zeros for {len(still)} of {count} parameters: {list_first(still, MOST_NAMED)}"
        return CheckResult("warning", losses_so_far, "a factor of 0, a dead activation, or detach() before them")
    return CheckResult(
        "pass", f"all {count} parameters have one" + (f"; {frozen} are frozen in all stages" if frozen else "")
    )


@contextmanager
def temporary_folder(logdir: Path) -> Iterator[Path]:
    """A folder on the file system of `logdir`, which may not be there yet; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix=".check-", dir=nearest_folder(logdir)) as folder:
        yield Path(folder)


def nearest_folder(path: Path) -> Path:
    """`path`, or the folder above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def check_checkpoint_roundtrip(
    logdir: Path,
    make_state: Callable[[int], TrainState],
    pack: Callable[[TrainState], dict[str, Any]],
    go_on: Callable[[TrainState, int], Any] | None,
) -> CheckResult:
    """Whether a state that is saved and loaded into another has the same bits, and goes on to the same bits.

    `make_state` makes a state of other random weights for 0 and 1, `pack` its checkpoint, `go_on(state, epoch)` trains
    and validates a little. Without `go_on` (kernels that give other bits each time) only what is loaded is compared.
    """
    from rich.filesize import decimal

    state, then = make_state(0), None
    if go_on is not None:
        go_on(state, 1)
    with temporary_folder(logdir) as folder:
        path = folder / "checkpoint.pth"
        size, _ = save_checkpoint(path, pack(state))
        saved = HostBuffers().copy(pack(state))
        if go_on is not None:
            then = HostBuffers().copy({"result": go_on(state, 2), **pack(state)})
        del state  # before the next is made: a GPU may not have room for both
        twin = make_state(1)
        twin.restore(read_checkpoint(path), path.name)
    hint = "what it computes with has to be in state_dict: register_buffer or get_extra_state in experiment/model.py"
    if lost := differences(saved, pack(twin)):
        return CheckResult("fail", f"loaded otherwise than saved: {list_first(lost, MOST_NAMED)}", hint)
    if go_on is not None and (lost := differences(then, {"result": go_on(twin, 2), **pack(twin)})):
        return CheckResult("fail", f"it loads, and a step later these differ: {list_first(lost, MOST_NAMED)}", hint)
    after = ", a step later too" if go_on is not None else "; no step compared: --no-deterministic"
    return CheckResult("pass", f"{decimal(size)} out and back, equal bit for bit{after}")


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The places where two nested values differ, bit for bit; an empty list where none does."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = [*one, *(key for key in other if key not in one)]
        missing = [f"{name}{key}" for key in names if (key in one) != (key in other)]
        both = [key for key in names if key in one and key in other]
        return missing + [place for key in both for place in differences(one[key], other[key], f"{name}{key}.")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for number, pair in pairs for place in differences(*pair, f"{name}{number}.")]
    return [] if _is_same(one, other) else [name.rstrip(".")]


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one).equal(_bytes(other))
    both_nan = one != one and other != other
    return type(one) is type(other) and bool(one == other or both_nan)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
