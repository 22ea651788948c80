"""Search for good options of train.py with Optuna; each trial is a separate run.

    uv run --extra sweep python tools/sweep.py --logdir logs/sweep --trials 20 \
        --search "stages.0.lr=log(1e-4,1e-2)" "optimizer=adamw|sgd" "mixup=0..0.4" -- --stages.0.epochs 3

The options after `--` are passed to train.py. After an interruption, start the sweep again with the same options:
trials that were running are resumed, and the next ones are those of an uninterrupted sweep.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batteries.core.command_line import parse, run_command
from batteries.core.config_io import flatten
from batteries.core.errors import RunError, UserError
from batteries.core.files import DirectoryLock
from batteries.core.project import ROOT
from batteries.core.text import count_of
from batteries.core.validators import Count, Seed, check_ranges
from batteries.distributed.device import find_device
from batteries.distributed.process_group import require_single_process
from batteries.report.sweep_report import Axis, ScoredTrial, SweepReport, write_sweep_report
from batteries.run.directory import holds_run
from batteries.sweep.optional_import import import_optuna
from batteries.sweep.search_space import OF_THE_SWEEP, SearchedOption, format_value, parse_search, with_values
from batteries.sweep.study import Pruner, Sampler, SweepStudy
from batteries.sweep.trial_process import SECONDS_BETWEEN_POLLS, Launch, TrialFiles, TrialProcess
from batteries.sweep.trial_table import STATES, format_table, header_of, importances, trial_rows, write_files
from train import Config


@dataclass(frozen=True)
class Options:
    """Search for good options of train.py. The options of all trials follow after `--`."""

    search: tuple[str, ...] = ()  # what to vary: NAME=low..high, low..high:step, log(low,high) or a|b|c
    logdir: Path = Path("logs/sweep")  # directory of the sweep; one that holds a sweep is continued
    trials: Count = 20  # number of trials, with those that are pruned or fail
    sampler: Sampler = "tpe"  # tpe learns from earlier trials; random; grid takes all combinations
    pruner: Pruner = "none"  # end bad trials early: median, or hyperband, by their metrics after each epoch
    seed: Seed = 0  # seed of the sampler; that of training is an option of train.py
    launch: Launch = "device"  # the launch script of a trial: scripts/train_device.sh, train_dp.sh or train_ddp.sh
    devices: tuple[str, ...] = ()  # run one trial on each at a time, such as cuda:0 cuda:1, or cpu cpu
    max_failures: Count = 3  # failed trials in a row that end the sweep
    keep_checkpoints: Count | None = None  # delete the checkpoints of all but this many best trials; by default none
    add_to_scores: bool = False  # add the best trial to the score log (tools/scores.py)

    def __post_init__(self) -> None:
        """Validate the options."""
        check_ranges(self)
        if self.devices and self.launch != "device":
            raise UserError(
                f"--devices and --launch {self.launch} exclude each other: a trial uses all GPUs; remove one."
            )


def main(options: Options, train_flags: Sequence[str]) -> None:
    """Run the trials that are missing, and summarise all of them."""
    require_single_process("sweep.py")
    base = parse(Config, list(train_flags))
    searched = parse_search(options.search, base)
    check_train_flags(train_flags, searched, options)
    for device in set(options.devices):
        find_device(device)
    if holds_run(options.logdir) and not (options.logdir / "study.db").exists():
        raise UserError(f"--logdir {options.logdir} already holds a run; use another --logdir.")
    options.logdir.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(options.logdir / ".lock")
    lock.acquire()
    study = SweepStudy(
        options.logdir,
        searched,
        recipe_of(base, searched),
        minimize=base.minimize_metric,
        sampler=options.sampler,
        pruner=options.pruner,
        seed=options.seed,
        epochs=sum(stage.epochs for stage in base.stages),
    )
    sweep = Sweep(options, base, study)
    try:
        sweep.run()
    except import_optuna().exceptions.StorageInternalError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise RunError(f"{options.logdir / 'study.db'} cannot be written ({reason}); trials are saved.") from error
    finally:
        sweep.stop()
        lock.release()
    summarize(options, base, study, searched)


def check_train_flags(train_flags: Sequence[str], searched: Sequence[SearchedOption], options: Options) -> None:
    """Raise UserError for options of train.py that the sweep sets."""
    given = [
        word.partition("=")[0].removeprefix("--").replace("-", "_") for word in train_flags if word.startswith("--")
    ]
    names = [*OF_THE_SWEEP, *(option.name for option in searched), *(["device"] if options.devices else [])]
    for name in names:
        for form in (name, f"no_{name}"):
            if form in given:
                raise UserError(f"--{form.replace('_', '-')} after `--` is set by the sweep; leave it out.")


def recipe_of(base: Config, searched: Sequence[SearchedOption]) -> str:
    """Return as JSON the options that all trials have in common, except those that do not affect the results."""
    values = with_values(base, {option.name: None for option in searched})
    return json.dumps({name: value for name, value in flatten(values) if name not in (*OF_THE_SWEEP, "device")})


class Sweep:
    """The trials that run at the moment.

    Attributes:
        running: Their processes.
    """

    def __init__(self, options: Options, base: Config, study: SweepStudy) -> None:
        self.running: list[TrialProcess] = []
        self._options = options
        self._base = base
        self._study = study
        self._failures: list[str] = []  # the causes of the failures since the last trial that did not fail
        self._free: list[str | None] = list(options.devices) or [None]
        self._threads = None
        if len(self._free) > 1:
            self._threads = max(1, (os.cpu_count() or 1) // len(self._free))

    def run(self) -> None:
        """Continue the trials that were interrupted, and start new ones until there are `--trials`.

        Raises:
            RunError: If too many trials in a row failed.
        """
        interrupted = self._study.running()
        while True:
            while self._free and (number := self._next(interrupted)) is not None:
                self._start(number)
            if not self.running:
                return
            time.sleep(SECONDS_BETWEEN_POLLS)
            for process in list(self.running):
                self._poll(process)

    def stop(self) -> None:
        """Save and end all running trials; they are resumed when the sweep is started again."""
        for process in self.running:
            process.stop()

    def _next(self, interrupted: list[int]) -> int | None:
        """Return the number of the trial to start next; None if there is none."""
        if len(self._failures) >= self._options.max_failures:
            if self.running:
                return None
            raise RunError(
                f"the sweep ends after {len(self._failures)} failed trials in a row, the last one with: "
                f"{self._failures[-1]}"
            )
        if interrupted:
            return interrupted.pop(0)
        return self._study.draw() if len(self._study.trials) < self._options.trials else None

    def _start(self, number: int) -> None:
        """Start a trial, unless its epochs so far already show that it is pruned."""
        files = TrialFiles.of(self._options.logdir, number)
        params = self._study.trials[number].params
        values = ", ".join(f"{name} {format_value(value)}" for name, value in params.items())
        reported = self._report(number, files, 0)
        if reported is None:
            self._end_pruned(number)
            return
        print(f"trial {number}  {values}", flush=True)
        process = TrialProcess(
            number,
            files,
            trial_values(self._base, params),
            launch=self._options.launch,
            device=self._free.pop(0),
            threads=self._threads,
        )
        process.reported = reported
        self.running.append(process)

    def _poll(self, process: TrialProcess) -> None:
        """Report new epochs of a trial; end it if it is pruned, and record the score if it ended."""
        code = process.exit_code()  # before its metrics are read, which are then complete
        reported = self._report(process.number, process.files, process.reported)
        if reported is None:
            process.stop()
            self._remove(process)
            self._end_pruned(process.number)
            return
        process.reported = reported
        if code is None:
            return
        self._remove(process)
        outcome = process.files.outcome(code)
        if outcome.score is None:
            self._study.fail(process.number, outcome.cause)
            self._failures.append(outcome.cause)
            print(f"trial {process.number} failed: {outcome.cause}", flush=True)
        else:
            self._study.complete(process.number, outcome.score)
            self._failures.clear()
            print(f"trial {process.number}  {self._base.main_metric} {outcome.score:.4f}", flush=True)
        self._delete_checkpoints()

    def _report(self, number: int, files: TrialFiles, reported: int) -> int | None:
        """Report the scores of epochs to the study, one after the other, until one of them prunes the trial.

        Returns:
            The number of epochs that were reported so far; None if the trial is pruned.
        """
        if self._options.pruner == "none":
            return 0
        trial = self._study.trial(number)
        known = self._study.trials[number].intermediate_values  # those before an interruption, too
        last = self._count_epochs(number)  # a trial is not pruned after it, because nothing is saved
        for epoch, score in enumerate(files.scores(self._base.main_metric)[reported:], start=reported + 1):
            if epoch not in known:
                trial.report(score, epoch)
            if epoch >= max(known, default=0) and epoch < last and trial.should_prune():
                return None
            reported = epoch
        return reported

    def _count_epochs(self, number: int) -> int:
        """Return the epochs of a trial over all stages."""
        values = with_values(self._base, self._study.trials[number].params)
        return sum(stage["epochs"] for stage in values["stages"])

    def _end_pruned(self, number: int) -> None:
        self._study.prune(number)
        self._failures.clear()
        print(f"trial {number} is pruned", flush=True)
        self._delete_checkpoints()

    def _remove(self, process: TrialProcess) -> None:
        self.running.remove(process)
        self._free.append(process.device)

    def _delete_checkpoints(self) -> None:
        """Delete the checkpoints of trials that are not among the best ones, if --keep-checkpoints is given."""
        if self._options.keep_checkpoints is None:
            return
        kept = {trial.number for trial in self._study.complete_trials()[: self._options.keep_checkpoints]}
        for trial in self._study.trials:
            if trial.state.is_finished() and trial.number not in kept:
                for path in TrialFiles.of(self._options.logdir, trial.number).directory.glob("*/*.pth"):
                    path.unlink()


def trial_values(base: Config, params: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a trial, as JSON values, without those that the sweep gives as flags."""
    values = with_values(base, params)
    return {name: value for name, value in values.items() if name not in OF_THE_SWEEP}


def summarize(options: Options, base: Config, study: SweepStudy, searched: Sequence[SearchedOption]) -> None:
    """Print the table of all trials, and write trials.csv, best.json and the report."""
    names = [option.name for option in searched]
    complete = study.complete_trials()
    best = trial_values(base, complete[0].params) if complete else {}
    write_files(options.logdir, study, names, base.main_metric, best)
    report = options.logdir / "report.html"
    write_sweep_report(report, report_of(study, searched, base.main_metric))
    print(format_table(header_of(base.main_metric, names), trial_rows(study, names)))
    print(f"report   {report}")
    if not complete:
        raise RunError(f"none of {count_of(len(study.trials), 'trial')} ended with a score; see the causes above.")
    directory = TrialFiles.of(options.logdir, complete[0].number).directory
    print(f"best     {directory}")
    print(f"next     scripts/train_{options.launch}.sh --config {options.logdir / 'best.json'} --logdir logs/best")
    if options.add_to_scores:
        note = f"best of {count_of(len(study.trials), 'trial')} of {options.logdir}"
        command = [sys.executable, "-m", "tools.scores", "add", str(directory.resolve()), "--note", note]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise RunError("the best trial was not added to the score log; see the message above.")


def report_of(study: SweepStudy, searched: Sequence[SearchedOption], metric: str) -> SweepReport:
    """Return the contents of the report."""
    names = [option.name for option in searched]
    complete = study.complete_trials()
    states = [trial.state.name for trial in study.trials]
    counts = ", ".join(f"{states.count(state)} {name}" for state, name in STATES.items() if state in states)
    best = ", ".join(f"{name} {format_value(value)}" for name, value in complete[0].params.items()) if complete else ""
    return SweepReport(
        subtitle=f"{count_of(len(states), 'trial')}: {counts}",
        header=header_of(metric, names),
        rows=trial_rows(study, names),
        trials=[
            ScoredTrial(trial.number, trial.value, [option.position(trial.params[option.name]) for option in searched])
            for trial in complete
        ],
        axes=[Axis(option.name, option.ticks()) for option in searched],
        metric=metric,
        importance=importances(study, names),
        best=f"trial {complete[0].number}: {best}" if complete else "",
    )


class Terminated(BaseException):
    """SIGTERM or SIGHUP ends the sweep as Ctrl-C does: its trials are saved.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def raise_on_signal(number: int, _: object) -> None:
    """Raise Terminated."""
    raise Terminated(number)


if __name__ == "__main__":
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags_of_training = sys.argv[place + 1 :]
    del sys.argv[place:]
    for terminating in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(terminating) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(terminating, raise_on_signal)

    def run_sweep(options: Options) -> None:
        """Run the sweep with the options of train.py."""
        main(options, flags_of_training)

    try:
        run_command(run_sweep, Options, repeats=False)
    except Terminated as terminated:
        print(f"stopped by {terminated.number.name}; start the sweep again to continue it.", file=sys.stderr)
        sys.exit(128 + terminated.number)
