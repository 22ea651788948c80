"""When a checkpoint is written within an epoch, and when a signal ends the run."""

import time

from batteries.core.ranks import is_rank_zero
from batteries.core.signals import Preempted, SignalHandler
from batteries.distributed.collectives import AsyncMaxReduce, gather_over_ranks

# The values that ranks agree on after a step. SAVE + n: write a checkpoint, then end the run because of signal n.
NOTHING = 0
SAVE = 1


class CheckpointPolicy:
    """Decides after each step whether to write a checkpoint. All ranks make the same decision.

    Attributes:
        signals: The handler of signals that ask the run to stop.
    """

    def __init__(self, every_minutes: float | None, every_steps: int | None) -> None:
        """Create a policy.

        Args:
            every_minutes: The time between checkpoints within an epoch, by the clock of rank 0; None for never.
            every_steps: The number of steps of an epoch between checkpoints; None for never.
        """
        self.signals = SignalHandler()
        self._every_minutes = every_minutes
        self._every_steps = every_steps
        self._saved_at = time.monotonic()
        self._agree = AsyncMaxReduce()  # ranks learn what was agreed one step later, so no step waits

    def should_save(self, step: int, steps: int) -> tuple[bool, int]:
        """Decide after optimizer step `step` (from 1) of `steps` in the epoch. Every rank must call it after each step.

        Returns:
            Whether to write a checkpoint now, and the number of the signal that then ends the run; 0 for none.
        """
        received = self.signals.received
        agreed = self._agree(SAVE + received if received else self._due_by_clock())
        ends_epoch = step == steps
        due_by_count = self._every_steps is not None and step % self._every_steps == 0 and not ends_epoch
        if agreed == SAVE and ends_epoch:
            agreed = NOTHING  # the checkpoint at the end of the epoch comes next
        return agreed != NOTHING or due_by_count, max(agreed - SAVE, 0)

    def note_saved(self) -> None:
        """Start the time until the next checkpoint."""
        self._saved_at = time.monotonic()

    def raise_if_preempted(self) -> None:
        """Raise Preempted if any rank received a signal since the last step. Every rank must call it."""
        if received := max(gather_over_ranks(self.signals.received)):
            raise Preempted(received)

    def _due_by_clock(self) -> int:
        if self._every_minutes is None or not is_rank_zero():
            return NOTHING
        if time.monotonic() - self._saved_at < 60 * self._every_minutes:
            return NOTHING
        self._saved_at = time.monotonic()
        return SAVE
