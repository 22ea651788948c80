"""The study of a sweep: Optuna's own storage in the sweep's directory, which optuna-dashboard opens.

Each trial is drawn with a separate generator, seeded by the seed of the sweep and the number of the trial, from the
trials before it. A trial is added to the storage with its values, in one transaction. So a sweep that was killed draws
the same trials as one that was not.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from batteries.core.errors import UserError
from batteries.sweep.optional_import import import_optuna
from batteries.sweep.search_space import SearchedOption, grid_points

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["none", "median", "hyperband"]
STUDY_NAME = "sweep"


class SweepStudy:
    """The trials of a sweep.

    Attributes:
        study: The study of Optuna.
    """

    def __init__(
        self,
        directory: Path,
        options: Sequence[SearchedOption],
        recipe: str,
        *,
        minimize: bool,
        sampler: Sampler,
        pruner: Pruner,
        seed: int,
        epochs: int,
    ) -> None:
        """Create the study, or open the one of an earlier start.

        Args:
            directory: The directory of the sweep.
            options: The options that are varied.
            recipe: The options that all trials have in common, as text; the same when a sweep is continued.
            minimize: Whether a lower score is better.
            sampler: How values are drawn.
            pruner: Which trials are ended early.
            seed: The seed of the sampler.
            epochs: The epochs of a trial over all stages.

        Raises:
            UserError: If the directory has a study of another search space, or of another recipe.
        """
        self._optuna = import_optuna()
        self._options = options
        self._sampler: Sampler = sampler
        self._seed = seed
        self._direction = "minimize" if minimize else "maximize"
        self._pruner = self._make_pruner(pruner, epochs)
        self.study = self._optuna.create_study(
            storage=f"sqlite:///{directory / 'study.db'}",
            study_name=STUDY_NAME,
            direction=self._direction,
            pruner=self._pruner,
            load_if_exists=True,
        )
        about = {
            "search": json.dumps([option.text for option in options]),
            "recipe": recipe,
            "sampler": f"{sampler}, seed {seed}, pruner {pruner}",
        }
        for name, value in about.items():
            before = self.study.user_attrs.get(name)
            if before is None:
                self.study.set_user_attr(name, value)
            elif before != value:
                raise UserError(
                    f"--logdir {directory} has a study with another {name} ({_difference(before, value)}); give the "
                    "same options to continue it, or use another --logdir."
                )

    def _make_pruner(self, pruner: Pruner, epochs: int) -> Any:
        pruners = self._optuna.pruners
        if pruner == "median":
            return pruners.MedianPruner(n_warmup_steps=1)
        if pruner == "hyperband":
            return pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
        return pruners.NopPruner()

    @property
    def trials(self) -> list[Any]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def running(self) -> list[int]:
        """Return the numbers of the trials that were started and did not end."""
        return [trial.number for trial in self.trials if not trial.state.is_finished()]

    def draw(self) -> int | None:
        """Add the next trial and return its number; None if a grid has no more points."""
        trials = self.trials
        distributions = {option.name: option.distribution() for option in self._options}
        if self._sampler == "grid":
            points = list(grid_points(self._options))
            if len(trials) >= len(points):
                return None
            params = points[len(trials)]
        else:
            params = self._sample(trials, distributions)
        running = self._optuna.trial.TrialState.RUNNING
        trial = self._optuna.trial.create_trial(state=running, params=params, distributions=distributions)
        self.study.add_trial(trial)
        return len(trials)

    def _sample(self, trials: Sequence[Any], distributions: dict[str, Any]) -> dict[str, Any]:
        """Draw values from the trials so far, in a copy of the study in memory."""
        seed = int(np.random.SeedSequence((self._seed, len(trials))).generate_state(1)[0])
        samplers = self._optuna.samplers
        if self._sampler == "tpe":
            # constant_liar: a trial that runs at the same time counts as a bad one, so that it is not drawn again.
            sampler = samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        else:
            sampler = samplers.RandomSampler(seed=seed)
        copied = self._optuna.create_study(
            study_name=STUDY_NAME, direction=self._direction, sampler=sampler, pruner=self._pruner
        )
        copied.add_trials(trials)
        return copied.ask(distributions).params

    def trial(self, number: int) -> Any:
        """Return a trial that can report values and be pruned."""
        return self._optuna.trial.Trial(self.study, self.trials[number]._trial_id)

    def complete(self, number: int, score: float) -> None:
        """Record the score of a trial."""
        self.study.tell(number, score)

    def prune(self, number: int) -> None:
        """Record that a trial was ended early; its value is the last one that it reported."""
        self.study.tell(number, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, number: int, cause: str) -> None:
        """Record that a trial failed, with the cause in one line."""
        self.trial(number).set_user_attr("cause", cause)
        self.study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def complete_trials(self) -> list[Any]:
        """Return the trials that ended with a score, the best one first; of equal ones the first."""
        complete = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        sign = 1 if self._direction == "minimize" else -1
        return sorted(complete, key=lambda trial: (sign * trial.value, trial.number))


def _difference(before: str, now: str) -> str:
    """Return what differs between two texts, short enough for a message."""
    if before.startswith("{"):  # options of train.py
        old, new = json.loads(before), json.loads(now)
        names = [name for name in old | new if old.get(name) != new.get(name)]
        return ", ".join(f"{name} {old.get(name)} before, {new.get(name)} now" for name in names)
    start = next((i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, start - 20)
    return f"{before[start : start + 60]!r} before, {now[start : start + 60]!r} now"
