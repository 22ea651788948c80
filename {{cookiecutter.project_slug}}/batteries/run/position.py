"""The position of a run in its stages, epochs and steps, and the .jsonl files up to it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from batteries.core.files import write_text
from batteries.core.jsonl import read_jsonl


class TrainingPosition(NamedTuple):
    """Where training continues.

    Attributes:
        stage: The stage, from 0.
        epoch: The epoch, from 1.
        step: The number of steps of the epoch that are done.
    """

    stage: int = 0
    epoch: int = 1
    step: int = 0


def truncate_jsonl(path: Path, stages: Sequence[str], position: TrainingPosition) -> None:
    """Remove the lines at or after `position` from a .jsonl file, and a last line that is incomplete.

    Args:
        path: The file; it need not exist.
        stages: The names of all stages.
        position: Where training continues.
    """
    if not path.exists():
        return
    kept = []
    for line, record in read_jsonl(path):
        if record["stage"] not in stages or (stages.index(record["stage"]), record["epoch"]) >= position[:2]:
            break
        kept.append(line)
    write_text(path, "".join(kept))


def has_metrics_before(
    path: Path, stages: Sequence[str], saved: tuple[str, int], position: TrainingPosition, unwritten: list[list[str]]
) -> bool:
    """Return whether the metrics of the last complete epoch before `position` are written, or kept in the checkpoint.

    Args:
        path: metrics.jsonl.
        stages: The names of all stages.
        saved: The stage and epoch of the checkpoint.
        position: Where training continues.
        unwritten: [file, line] for the lines that found no space on the disk.
    """
    stage, epoch, step = position
    if step > 0 and epoch == 1 and stage == 0:
        return True  # no epoch was completed
    records = [record for _, record in read_jsonl(path)]
    records += [json.loads(line) for file, line in unwritten if file == path.name]
    logged = {(record["stage"], record["epoch"]) for record in records}
    if step == 0:  # the checkpoint is at the end of an epoch
        return saved in logged
    if epoch > 1:
        return (saved[0], epoch - 1) in logged
    return any(name == stages[stage - 1] for name, _ in logged)  # a stage may end before its last epoch
