"""Go on with a run that was cut, from its newest sound checkpoint, at the step after it.

Random streams follow from (seed, stage, epoch, position), so that no generator's state has to be kept: a cursor is
enough.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from batteries.checkpoints import Row, read_checkpoint, read_ledger
from batteries.errors import BadInput
from batteries.files import write_text
from batteries.lines import read_lines

FIRST_WEIGHTS = ("init_from", "pretrained")  # knobs of how a run began; one that goes on needs neither


class Cursor(NamedTuple):
    """Where to go on: the stage from 0, the epoch from 1, and how many of its steps are done."""

    stage: int = 0
    epoch: int = 1
    step: int = 0


@dataclass
class Found:
    """The newest sound checkpoint of a run, None where it has none yet, and what happened to newer ones."""

    checkpoint: dict[str, Any] | None = None
    name: str = ""
    messages: list[str] = field(default_factory=list)

    @property
    def cursor(self) -> Cursor:
        """The first step that is not in the checkpoint."""
        return Cursor() if self.checkpoint is None else Cursor(*self.checkpoint["resume"]["cursor"])


def find_newest(logdir: Path, stages: Sequence[str]) -> Found:
    """The newest checkpoint whose bytes are what the ledger says; damaged ones become `*.corrupt`.

    Raises BadInput where the run has checkpoints and none is sound: never a silent fresh start.
    """
    rows = [(name, row) for name in stages for row in read_ledger(logdir / name)["rows"]]
    messages = []
    for stage, row in reversed(rows):
        path = logdir / stage / row.file
        try:
            return Found(read_checkpoint(path), str(path), [*messages, *_steps_lost(rows[-1], stage, row)])
        except BadInput:
            messages.append(_set_aside(path))
    if rows:
        raise BadInput(f"--resume finds no sound checkpoint in {logdir}: {' '.join(messages)} Start in another logdir.")
    return Found()


def _set_aside(path: Path) -> str:
    if not path.exists():
        return f"{path} is missing."
    os.replace(path, f"{path}.corrupt")
    return f"{path} is damaged and was set aside as {path.name}.corrupt."


def _steps_lost(newest: tuple[str, Row], stage: str, row: Row) -> list[str]:
    if newest == (stage, row):
        return []
    lost = (
        f"{newest[1].step - row.step} steps of it" if newest[0] == stage else f"{newest[1].step} steps of {newest[0]}"
    )
    return [f"The run goes on from {stage}/{row.file}; {lost} are done again."]


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str], cursor: Cursor) -> None:
    """Raise BadInput where a knob that matters has changed since the run was cut, with both values.

    Stages that have not begun may change; `may_change` names the knobs that change no number.
    """
    for name in [*new, *(set(old) - set(new))]:
        if name not in may_change and name != "stages" and old.get(name) != new.get(name):
            flag = f"--{name.replace('_', '-')}"
            _refuse(flag, old.get(name), new.get(name))
    begun = cursor.stage + 1
    if len(new["stages"]) < begun:
        raise BadInput(
            f"--resume would change the run: it is in its stage {begun}, and there are {len(new['stages'])}."
        )
    for number, (was, now) in enumerate(zip(old["stages"][:begun], new["stages"], strict=False)):
        for name in was:
            if was[name] != now.get(name):
                _refuse(f"--stages.{number}.{name.replace('_', '-')}", was[name], now.get(name))


def _refuse(flag: str, before: Any, now: Any) -> NoReturn:
    """Raise BadInput for one knob, with the way to give it as it was."""
    if before is None:
        mend = f"leave {flag} out"
    elif isinstance(before, bool):
        mend = f"give --{'' if before else 'no-'}{flag.removeprefix('--')}"
    elif isinstance(before, list):
        mend = f"give {flag} {' '.join(map(str, before))}" if before else f"leave {flag} out"
    else:
        mend = f"give {flag} {before}"
    raise BadInput(f"--resume would change the run: {flag} was {before} and is {now}; {mend}, or another --logdir.")


def fingerprint(*parts: Any) -> str:
    """A sha256 over arrays, texts and numbers: what a run is trained on."""
    digest = hashlib.sha256()
    for part in parts:
        array = np.ascontiguousarray(part)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_lines(path: Path, stages: Sequence[str], found: Found) -> None:
    """Raise BadInput where the metrics of the last epoch before the cursor are neither in `path` nor still to write."""
    if found.checkpoint is None:
        return
    stage, epoch, step = found.cursor
    name, last = found.checkpoint["stage"], found.checkpoint["epoch"]
    if step > 0:
        name, last = (name, epoch - 1) if epoch > 1 else (stages[stage - 1] if stage else "", None)
    if not name:
        return
    records = [record for _, record in read_lines(path)]
    records += [json.loads(line) for file, line in found.checkpoint["resume"]["unwritten"] if file == path.name]
    if not any(record["stage"] == name and last in (None, record["epoch"]) for record in records):
        raise BadInput(f"{path} lacks the epoch before that of {found.name}; put it back, or use another --logdir.")


def cut_lines(path: Path, stages: Sequence[str], cursor: Cursor) -> None:
    """Drop from a .jsonl file what comes at or after the cursor, and a line that a kill has torn."""
    if not path.exists():
        return
    kept = []
    for line, record in read_lines(path):
        if record["stage"] not in stages or (stages.index(record["stage"]), record["epoch"]) >= cursor[:2]:
            break
        kept.append(line)
    write_text(path, "".join(kept))
