"""The position of a run in its stages, epochs and steps, and the .jsonl files up to it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from batteries.core.files import write_text
from batteries.core.jsonl import read_jsonl


class TrainingPosition(NamedTuple):
    """Where training continues: the stage from 0, the epoch from 1, and the number of its steps that are done."""

    stage: int = 0
    epoch: int = 1
    step: int = 0


def truncate_jsonl(path: Path, stages: Sequence[str], position: TrainingPosition) -> None:
    """Remove the lines at or after `position` from a .jsonl file, and a last line that is incomplete."""
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
    name: str = saved[0]
    last: int | None = saved[1]
    if step > 0 and epoch > 1:
        last = epoch - 1
    elif step > 0:
        name, last = (stages[stage - 1] if stage else ""), None
    if not name:
        return True
    records = [record for _, record in read_jsonl(path)]
    records += [json.loads(line) for file, line in unwritten if file == path.name]
    return any(record["stage"] == name and last in (None, record["epoch"]) for record in records)
