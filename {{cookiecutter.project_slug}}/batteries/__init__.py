"""Batteries: the parts of a training run that one can only get wrong. None of them knows your task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batteries.averaging import average_checkpoints
    from batteries.checkpoints import CheckpointManager, load_checkpoint, make_checkpoint, save_checkpoint
    from batteries.cli import run_command
    from batteries.data import Epoch, EvalLoader, TrainLoader
    from batteries.devices import start_process
    from batteries.distributed import first_on_each_machine
    from batteries.errors import BadInput
    from batteries.metrics import Averages
    from batteries.parallel import accumulate, check_batchnorm, evaluation, place_model
    from batteries.randomness import Stream, random_stream, seed_all
    from batteries.resume import fingerprint
    from batteries.runs import Run
    from batteries.sheets import sample_sheet
    from batteries.splits import SplitFile, check_files
    from batteries.trackers import Tracker, default_trackers

_HOMES = {
    "averaging": ("average_checkpoints",),
    "checkpoints": ("CheckpointManager", "load_checkpoint", "make_checkpoint", "save_checkpoint"),
    "cli": ("run_command",),
    "data": ("Epoch", "EvalLoader", "TrainLoader"),
    "devices": ("start_process",),
    "distributed": ("first_on_each_machine",),
    "errors": ("BadInput",),
    "metrics": ("Averages",),
    "parallel": ("accumulate", "check_batchnorm", "evaluation", "place_model"),
    "randomness": ("Stream", "random_stream", "seed_all"),
    "resume": ("fingerprint",),
    "runs": ("Run",),
    "sheets": ("sample_sheet",),
    "splits": ("SplitFile", "check_files"),
    "trackers": ("Tracker", "default_trackers"),
}

__all__ = [
    "Averages",
    "BadInput",
    "CheckpointManager",
    "Epoch",
    "EvalLoader",
    "Run",
    "SplitFile",
    "Stream",
    "Tracker",
    "TrainLoader",
    "accumulate",
    "average_checkpoints",
    "check_batchnorm",
    "check_files",
    "default_trackers",
    "evaluation",
    "fingerprint",
    "first_on_each_machine",
    "load_checkpoint",
    "make_checkpoint",
    "place_model",
    "random_stream",
    "run_command",
    "sample_sheet",
    "save_checkpoint",
    "seed_all",
    "start_process",
]


def __getattr__(name: str) -> Any:
    """A public name from the module that has it (PEP 562): a verb that reads tables need not wait seconds for torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"batteries.{module}"), name)
    raise AttributeError(f"module 'batteries' has no attribute {name!r}")
