"""Batteries: the parts of a training run that one can only get wrong. None of them knows your task."""

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
