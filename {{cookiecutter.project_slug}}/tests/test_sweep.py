"""tools/sweep.py: a sweep that is killed at any instant continues as if it had not been."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest
from marks import CLASSES_ONLY
from processes import SECONDS, End, run_train, wait_until
from small_data import NEEDS_PATCH, make_data

from batteries.core.errors import RunError, UserError
from batteries.core.files import DirectoryLock
from batteries.sweep import trial_process
from batteries.sweep.search_space import grid_points, parse_search
from batteries.sweep.trial_process import TrialFiles
from tools import scores, sweep
from train import Config

optuna = pytest.importorskip("optuna", reason="Optuna is an optional dependency: uv run --extra sweep")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="launch scripts need bash")

TRAIN_FLAGS = ["--stages.0.epochs", "3", "--stages.1.epochs", "1", "--tracker", "none", "--main-metric", "accuracy"]
SEARCH = ["stages.0.lr=log(1e-4,1e-1)", "optimizer=adamw|sgd"]


@pytest.fixture
def launch_scripts(monkeypatch, tmp_path) -> Path:
    """Replace the launch scripts by one that only writes the files of a run; return its project."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    program = Path(__file__).with_name("trial_of_sweep.py")
    for name in ("device", "ddp"):
        script = project / f"scripts/train_{name}.sh"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{program}" "$@"\n')
        script.chmod(0o755)
    monkeypatch.setattr(trial_process, "ROOT", project)
    return project


def run_sweep(directory: Path, *flags: str, search: Sequence[str] = SEARCH, train_flags: Sequence[str] = ()) -> End:
    def main(options: sweep.Options) -> None:
        sweep.main(options, [*TRAIN_FLAGS, *train_flags])

    words = ["--logdir", str(directory), "--search", *search, *flags]
    return run_train(main, sweep.Options, *words, name="tools/sweep.py", repeats=False)


def read_trials(directory: Path) -> list[dict[str, str]]:
    with (directory / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@CLASSES_ONLY
def test_sweep_finds_a_better_learning_rate_than_the_best_of_a_coarse_grid(launch_scripts, tmp_path):
    end = run_sweep(tmp_path / "sweep", "--trials", "25", search=SEARCH[:1])
    assert end.code == 0, end.err
    grid = run_sweep(tmp_path / "grid", "--sampler", "grid", search=["stages.0.lr=1e-4|1e-3|1e-2|1e-1"])
    assert grid.code == 0, grid.err
    best_of_grid = max(float(row["accuracy"]) for row in read_trials(tmp_path / "grid"))
    assert len(read_trials(tmp_path / "grid")) == 4  # a grid ends before --trials
    assert max(float(row["accuracy"]) for row in read_trials(tmp_path / "sweep")) > best_of_grid
    best = json.loads((tmp_path / "sweep/best.json").read_text())
    assert best["stages"][0]["lr"] == pytest.approx(3e-3, rel=0.5)
    path = tmp_path / "sweep/best.json"
    parsed = sweep.parse(Config, ["--config", str(path), "--logdir", "logs/best"])
    assert (parsed.stages[0].lr, parsed.logdir) == (best["stages"][0]["lr"], Path("logs/best"))


@CLASSES_ONLY
def test_optuna_reads_the_study(launch_scripts, tmp_path):
    end = run_sweep(tmp_path / "sweep", "--trials", "3")
    assert end.code == 0, end.err
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep/study.db'}")
    rows = read_trials(tmp_path / "sweep")
    assert [trial.value for trial in study.trials] == [float(row["accuracy"]) for row in rows]
    assert [trial.params["stages.0.lr"] for trial in study.trials] == [float(row["stages.0.lr"]) for row in rows]
    assert study.best_value == max(float(row["accuracy"]) for row in rows)
    values = [json.loads(TrialFiles.of(tmp_path / "sweep", n).config.read_text()) for n in range(3)]
    assert [value["optimizer"] for value in values] == [row["optimizer"] for row in rows]
    report = (tmp_path / "sweep/report.html").read_text()
    assert "Parallel coordinates" not in report  # plots are images; their text is in alt
    assert report.count("<img") == 2  # importance needs four trials


@CLASSES_ONLY
def test_more_trials_continue_a_sweep_and_none_is_run_twice(launch_scripts, tmp_path):
    assert run_sweep(tmp_path / "whole", "--trials", "6").code == 0
    assert run_sweep(tmp_path / "parts", "--trials", "2").code == 0
    assert run_sweep(tmp_path / "parts", "--trials", "6").code == 0
    assert (tmp_path / "parts/trials.csv").read_bytes() == (tmp_path / "whole/trials.csv").read_bytes()
    for number in range(6):
        starts = (TrialFiles.of(tmp_path / "parts", number).directory / "starts.txt").read_text()
        assert starts.count("\n") == 1


def start_and_kill(seconds: float, *arguments: object, **others: object) -> bool:
    """Start a sweep, kill it after some seconds, and return whether it was still running."""
    process = get_context("fork").Process(target=run_sweep_quietly, args=arguments, kwargs=others)
    process.start()
    process.join(seconds)
    is_running = process.exitcode is None
    if is_running:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return is_running


def run_sweep_quietly(directory: Path, *flags: str) -> None:
    words = ["--logdir", str(directory), "--search", *SEARCH, *flags]
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        sweep.main(sweep.parse(sweep.Options, words, repeats=False), TRAIN_FLAGS)


@CLASSES_ONLY
@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl, by which trials notice that the sweep was killed")
@pytest.mark.parametrize(
    "flags", [("--pruner", "none"), pytest.param(("--pruner", "median"), marks=pytest.mark.slow)], ids=" ".join
)
def test_sweep_killed_at_random_instants_ends_with_the_same_table(launch_scripts, tmp_path, flags):
    begin = time.monotonic()
    run_sweep_quietly(tmp_path / "whole", "--trials", "8", *flags)
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    kills = 0
    while kills < 5:
        if start_and_kill(rng.uniform(0.3, 0.6) * seconds, tmp_path / "killed", "--trials", "8", *flags):
            kills += 1
        else:
            assert (tmp_path / "killed/trials.csv").read_bytes() == (tmp_path / "whole/trials.csv").read_bytes()
            shutil.rmtree(tmp_path / "killed")
    run_sweep_quietly(tmp_path / "killed", "--trials", "8", *flags)
    assert (tmp_path / "killed/trials.csv").read_bytes() == (tmp_path / "whole/trials.csv").read_bytes()
    with sqlite3.connect(tmp_path / "killed/study.db") as database:
        assert database.execute("select count(*) from trials").fetchone() == (8,)


@CLASSES_ONLY
def test_signal_saves_the_trials_and_the_same_command_continues_them(launch_scripts, tmp_path):
    directory = tmp_path / "sweep"
    flags = ("--trials", "2", "--devices", "cpu", "cpu")
    process = get_context("fork").Process(target=sweep_with_signals, args=(directory, *flags))
    process.start()
    wait_until(lambda: all((directory / f"trial_000{n}/metrics.jsonl").exists() for n in (0, 1)), "two trials run")
    os.kill(process.pid, signal.SIGTERM)
    process.join(SECONDS)
    assert process.exitcode != 0
    assert not (directory / "trials.csv").exists()
    run_sweep_quietly(directory, *flags)
    assert [row["state"] for row in read_trials(directory)] == ["complete", "complete"]
    for number in (0, 1):
        assert len((directory / f"trial_000{number}/metrics.jsonl").read_text().splitlines()) == 4


def sweep_with_signals(*arguments: object) -> None:
    signal.signal(signal.SIGTERM, sweep.raise_on_signal)
    run_sweep_quietly(*arguments)  # type: ignore[arg-type]


@CLASSES_ONLY
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")),
    ],
)
def test_no_trial_outlives_its_sweep(launch_scripts, tmp_path, monkeypatch, number):
    monkeypatch.setattr(sys.modules[__name__], "TRAIN_FLAGS", [*TRAIN_FLAGS[2:], "--stages.0.epochs", "2000"])
    if number == signal.SIGTERM:
        monkeypatch.setattr(trial_process, "terminate_with_parent", lambda: None)  # the sweep ends its trials itself
    lines = tmp_path / "sweep/trial_0000/metrics.jsonl"
    process = get_context("fork").Process(target=sweep_with_signals, args=(tmp_path / "sweep",))
    process.start()
    wait_until(lines.exists, "a trial runs")
    os.kill(process.pid, number)
    process.join()
    wait_until(lambda: is_free(lines.with_name(".lock")), "the trial has ended")
    assert len(lines.read_text().splitlines()) < 2000


def is_free(path: Path) -> bool:
    """Return whether no process holds the lock of a run directory."""
    lock = DirectoryLock(path)
    try:
        lock.acquire()
    except UserError:
        return False
    lock.release()
    return True


@CLASSES_ONLY
def test_trial_waits_for_a_process_of_a_killed_sweep_that_still_saves(launch_scripts, tmp_path):
    directory = tmp_path / "sweep/trial_0000"
    directory.mkdir(parents=True)
    process = get_context("fork").Process(target=hold_lock, args=(directory, 1.0))
    process.start()
    wait_until((directory / "held").exists, "the lock is held")
    end = run_sweep(tmp_path / "sweep", "--trials", "1")
    process.join()
    assert end.code == 0, end.err
    assert [row["state"] for row in read_trials(tmp_path / "sweep")] == ["complete"]


def hold_lock(directory: Path, seconds: float) -> None:
    lock = DirectoryLock(directory / ".lock")
    lock.acquire()
    (directory / "held").touch()
    time.sleep(seconds)
    lock.release()


@CLASSES_ONLY
def test_two_trials_run_at_once_on_two_devices_and_divide_the_threads(launch_scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(sys.modules[__name__], "TRAIN_FLAGS", [*TRAIN_FLAGS[2:], "--stages.0.epochs", "60"])
    end = run_sweep(tmp_path / "sweep", "--trials", "4", "--devices", "cpu", "cpu")
    assert end.code == 0, end.err
    starts = [(tmp_path / f"sweep/trial_000{number}/starts.txt").read_text().split() for number in range(4)]
    assert all(start[:2] == ["cpu", "3"] for start in starts)
    ends = [(tmp_path / f"sweep/trial_000{number}/run.json").stat().st_mtime for number in range(4)]
    assert float(starts[1][2]) < ends[0]  # the second one started before the first one ended
    assert len({row["stages.0.lr"] for row in read_trials(tmp_path / "sweep")}) == 4


@CLASSES_ONLY
def test_failed_trial_is_recorded_with_its_cause_and_others_continue(launch_scripts, tmp_path):
    search = ["label_smoothing=0.0|0.5|0.1|0.75|0.25"]
    end = run_sweep(tmp_path / "sweep", "--sampler", "grid", search=search)
    assert end.code == 0, end.err
    rows = read_trials(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete", "failed", "complete", "failed", "failed"]
    assert rows[1]["cause"] == "label smoothing of a half is too much."
    assert rows[3]["cause"] == "ended by SIGKILL"
    assert rows[4]["cause"] == "best.pth cannot be written: No space left on device; make space."
    assert "trial 1 failed: label smoothing of a half is too much." in end.out


@CLASSES_ONLY
def test_full_disk_under_the_study_is_reported_in_one_line_and_trials_are_kept(launch_scripts, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("x") from OSError("database or disk is full")

    monkeypatch.setattr(sweep.SweepStudy, "complete", fail)
    end = run_sweep(tmp_path / "sweep", "--trials", "2")
    assert (end.code, end.err) == (
        1,
        f"error: {tmp_path / 'sweep/study.db'} cannot be written (database or disk is full); trials are saved.\n",
    )


@CLASSES_ONLY
def test_too_many_failures_in_a_row_end_the_sweep_and_it_can_be_continued(launch_scripts, tmp_path):
    flags = ["--trials", "6", "--max-failures", "2"]
    search = ["stages.0.lr=log(1e-4,1e-1)"]
    end = run_sweep(tmp_path / "sweep", *flags, search=search, train_flags=["--label-smoothing", "0.5"])
    assert end.code == 1
    cause = "label smoothing of a half is too much."
    assert end.err == f"error: the sweep ends after 2 failed trials in a row, the last one with: {cause}\n"
    end = run_sweep(tmp_path / "sweep", *flags, search=search, train_flags=["--label-smoothing", "0.5"])
    assert end.code == 1  # two more
    assert len(optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep/study.db'}").trials) == 4


@CLASSES_ONLY
def test_bad_trials_are_pruned_by_the_metrics_of_their_epochs(launch_scripts, tmp_path):
    flags = ["--trials", "12", "--pruner", "median"]
    end = run_sweep(tmp_path / "sweep", *flags, search=SEARCH[:1])
    assert end.code == 0, end.err
    rows = read_trials(tmp_path / "sweep")
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned
    assert "is pruned" in end.out
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep/study.db'}")
    for row in pruned:
        trial = study.trials[int(row["trial"])]
        last = max(trial.intermediate_values)
        complete = [t for t in study.trials[: trial.number] if t.state.name == "COMPLETE"]
        medians = sorted(max(v for e, v in t.intermediate_values.items() if e <= last) for t in complete)
        assert max(trial.intermediate_values.values()) <= medians[len(medians) // 2]


@CLASSES_ONLY
@pytest.mark.parametrize(("epoch", "state"), [(3, "pruned"), (4, "complete")])
def test_trial_is_not_pruned_after_its_last_epoch(launch_scripts, tmp_path, monkeypatch, epoch, state):
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: len(reports_of(trial)) >= epoch)
    with contextlib.suppress(RunError):  # no trial has a score if the only one is pruned
        run_sweep_quietly(tmp_path / "sweep", "--trials", "1", "--pruner", "median")
    assert [row["state"] for row in read_trials(tmp_path / "sweep")] == [state]


def reports_of(trial: optuna.trial.Trial) -> dict[int, float]:
    """Return the scores that a study has of a trial, by epoch."""
    return trial.study.get_trials()[trial.number].intermediate_values


@CLASSES_ONLY
def test_epochs_that_were_reported_before_an_interruption_are_not_reported_again(launch_scripts, tmp_path, monkeypatch):
    report = optuna.trial.Trial.report

    def report_once(trial: optuna.trial.Trial, value: float, step: int) -> None:
        assert step not in reports_of(trial)
        report(trial, value, step)

    monkeypatch.setattr(optuna.trial.Trial, "report", report_once)
    directory = tmp_path / "sweep"
    flags = ("--trials", "1", "--pruner", "median")
    process = get_context("fork").Process(target=sweep_with_signals, args=(directory, *flags))
    process.start()
    wait_until(lambda: count_reports(directory) > 0, "an epoch is reported")
    os.kill(process.pid, signal.SIGTERM)
    process.join(SECONDS)
    run_sweep_quietly(directory, *flags)
    assert count_reports(directory) == 4


def count_reports(directory: Path) -> int:
    """Count the scores of epochs that a study has."""
    with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(directory / "study.db") as connection:
        return connection.execute("SELECT COUNT(*) FROM trial_intermediate_values").fetchone()[0]
    return 0


@pytest.mark.slow
@CLASSES_ONLY
def test_hyperband_prunes_trials_and_the_sweep_can_be_continued(launch_scripts, tmp_path):
    flags = ["--pruner", "hyperband", "--sampler", "random"]
    assert run_sweep(tmp_path / "whole", *flags, "--trials", "14").code == 0
    assert run_sweep(tmp_path / "parts", *flags, "--trials", "5").code == 0
    assert run_sweep(tmp_path / "parts", *flags, "--trials", "14").code == 0
    assert (tmp_path / "parts/trials.csv").read_bytes() == (tmp_path / "whole/trials.csv").read_bytes()
    assert "pruned" in {row["state"] for row in read_trials(tmp_path / "whole")}


@CLASSES_ONLY
def test_best_trial_is_added_to_the_score_log_on_request(launch_scripts, tmp_path, monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    words = ["--logdir", str(tmp_path / "sweep"), "--search", "stages.0.lr=1e-4|3e-3", "--sampler", "grid"]
    sweep.main(sweep.parse(sweep.Options, words, repeats=False), TRAIN_FLAGS)
    assert not commands
    sweep.main(sweep.parse(sweep.Options, [*words, "--add-to-scores"], repeats=False), TRAIN_FLAGS)
    [command] = commands
    assert command[1:3] == ["-m", "tools.scores"]
    added = sweep.parse(scores.COMMANDS, command[3:], repeats=False)
    assert (added.logdir, added.note) == (tmp_path / "sweep/trial_0001", f"best of 2 trials of {tmp_path / 'sweep'}")


@CLASSES_ONLY
def test_checkpoints_are_deleted_only_if_asked_for(launch_scripts, tmp_path):
    assert run_sweep(tmp_path / "all", "--trials", "4").code == 0
    assert len(list((tmp_path / "all").glob("trial_*/stage0/best.pth"))) == 4
    assert run_sweep(tmp_path / "two", "--trials", "4", "--keep-checkpoints", "2").code == 0
    kept = {path.parts[-3] for path in (tmp_path / "two").glob("trial_*/stage0/best.pth")}
    rows = sorted(read_trials(tmp_path / "two"), key=lambda row: -float(row["accuracy"]))
    assert kept == {f"trial_{int(row['trial']):04d}" for row in rows[:2]}


def test_search_space_is_parsed_with_types():
    texts = ["stages.0.lr=log(1e-4,1e-2)", "mixup=0..0.4:0.1", "stages.1.epochs=2..5", "batch_size=log(16,64)"]
    texts += ["clip_norm=none|1|2.5", "drop-last=true|false", "optimizer=adamw|sgd"]
    lr, mixup, epochs, batch_size, clip, drop_last, optimizer = parse_search(texts, Config())
    assert lr.distribution() == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert mixup.distribution() == optuna.distributions.FloatDistribution(0, 0.4, step=0.1)
    assert epochs.distribution() == optuna.distributions.IntDistribution(2, 5)
    assert batch_size.distribution() == optuna.distributions.IntDistribution(16, 64, log=True)
    assert clip.choices == (None, 1, 2.5)
    assert (drop_last.name, drop_last.choices) == ("drop_last", (True, False))
    assert optimizer.choices == ("adamw", "sgd")
    assert mixup.grid() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    points = list(grid_points([epochs, optimizer]))
    assert len(points) == 8
    assert points[1] == {"stages.1.epochs": 2, "optimizer": "sgd"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr=log(1e-4,1e-2)", "lr is not an option of train.py; did you mean 'stages.0.lr'?"),
        ("optimiser=adamw|sgd", "optimiser is not an option of train.py; did you mean 'optimizer'?"),
        ("mixup", "has no values; give NAME=low..high"),
        ("mixup=", "has no values; give NAME=low..high"),
        ("mixup=0.1", "has one value; give NAME=low..high"),
        ("mixup=0.4..0.1", "is empty: the lower bound 0.4 must be less than 0.1."),
        ("mixup=0.1..0.1", "is empty: the lower bound 0.1 must be less than 0.1."),
        ("mixup=-1..1", "--mixup -1.0 must be 0 or more."),
        ("mixup=a..b", "a is not a number; give NAME=low..high"),
        ("mixup=0..0.4:0", "the step 0 must be greater than 0."),
        ("stages.0.lr=log(0,1)", "the lower bound 0 of a logarithmic range must be greater than 0."),
        ("stages.0.epochs=1.5..3", "1.5 is not an integer, which stages.0.epochs must be."),
        ("stages.0.lr=log(1e-4)", "log takes two bounds, such as log(1e-4,1e-2)."),
        ("stages.0.lr=log(1e-4,1e-3,1e-2)", "log takes two bounds, such as log(1e-4,1e-2)."),
        ("mixup=0..0.4:1", "the step 1 must divide the range, so that 0.4 is a value."),
        ("mixup=0..0.4:0.15", "the step 0.15 must divide the range, so that 0.4 is a value."),
        ("main_metric=accuracy|macro_f1", "scores of trials with another main_metric cannot be compared; leave it out"),
        ("seed=0..9", "scores of trials with another seed cannot be compared; leave it out."),
        ("fold=0|1", "scores of trials with another fold cannot be compared; leave it out."),
        ("stages.0.freeze=layer1|layer2", "stages.0.freeze is a list of values, which cannot be searched; give it "),
        ("batch_size=16|small", "batch_size"),
        ("optimizer=adamw|adamw", "has the value adamw twice."),
        ("optimizer=adamw|rmsprop", "optimizer"),
        ("logdir=a|b", "--logdir is set by the sweep; leave it out."),
    ],
)
def test_invalid_search_is_rejected_in_one_line_before_the_first_trial(tmp_path, text, message):
    end = run_sweep(tmp_path / "sweep", search=[text])
    assert end.code == 2
    assert end.err.startswith(f"error: --search {text}")
    assert message in end.err
    assert end.err.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("flags", "train_flags", "message"),
    [
        ([], ["--stages.0.lr", "0.1"], "--stages.0.lr after `--` is set by the sweep; leave it out."),
        ([], ["--logdir", "x"], "--logdir after `--` is set by the sweep; leave it out."),
        ([], ["--no-report"], "--no-report after `--` is set by the sweep; leave it out."),
        (["--devices", "cuda:7"], [], "--device cuda:7 "),
        (["--devices", "cpu"], ["--device", "cpu"], "--device after `--` is set by the sweep; leave it out."),
        (["--devices", "cpu", "--launch", "ddp"], [], "--devices and --launch ddp exclude each other"),
        (["--sampler", "grid"], [], "has no finite number of values for a grid; give a|b|c, or a step."),
    ],
)
def test_invalid_options_are_rejected(launch_scripts, tmp_path, flags, train_flags, message):
    end = run_sweep(tmp_path / "sweep", *flags, train_flags=train_flags)
    assert (end.code, end.err.count("\n")) == (2, 1), end.err
    assert message in end.err


def test_directory_of_a_run_is_rejected_and_unchanged(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    end = run_sweep(tmp_path)
    assert (end.code, end.err) == (2, f"error: --logdir {tmp_path} already holds a run; use another --logdir.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_search_is_required(tmp_path):
    end = run_train(lambda options: sweep.main(options, []), sweep.Options, name="tools/sweep.py", repeats=False)
    assert end.code == 2
    assert end.err.startswith("error: --search is missing; give what to vary, as NAME=low..high")


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"search": ["mixup=0..0.4"]}, "search ("),
        ({"train_flags": ["--batch-size", "64"]}, "recipe (batch_size 32 before, 64 now)"),
        ({"flags": ["--sampler", "random"]}, "sampler ("),
    ],
)
def test_study_of_other_options_in_the_directory_is_rejected(launch_scripts, tmp_path, changes, what):
    assert run_sweep(tmp_path / "sweep", "--trials", "1").code == 0
    before = (tmp_path / "sweep/study.db").read_bytes()
    flags = changes.pop("flags", [])
    end = run_sweep(tmp_path / "sweep", "--trials", "1", *flags, **changes)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert f"has a study with another {what}" in end.err
    assert (tmp_path / "sweep/study.db").read_bytes() == before


@CLASSES_ONLY
def test_second_sweep_in_one_directory_is_rejected(launch_scripts, tmp_path):
    (tmp_path / "sweep").mkdir()
    process = get_context("fork").Process(target=run_sweep_quietly, args=(tmp_path / "sweep", "--trials", "30"))
    process.start()
    wait_until((tmp_path / "sweep/study.db").exists, "the first sweep has begun")
    end = run_sweep(tmp_path / "sweep", "--trials", "1")
    process.kill()
    process.join()
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "is in use by process" in end.err


def test_missing_optuna_is_reported_with_the_command_that_installs_it(launch_scripts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError) as error:
        sweep.main(sweep.Options(tuple(SEARCH), tmp_path / "sweep"), TRAIN_FLAGS)
    assert "needs Optuna, which is not installed; install it: uv run --extra sweep" in str(error.value)


NEEDS_PROCESSES = pytest.mark.skipif(NEEDS_PATCH, reason="the small data can only be read in this process")


def sweep_over_training(tmp_path: Path, name: str, *flags: str, **others: str) -> End:
    """Run a sweep whose trials really train, for one short epoch in each stage."""
    data = tmp_path / "data"
    if not data.exists():
        make_data(data)
    train_flags = {
        "--data-dir": str(data),
        "--split-file": str(tmp_path / "split.csv"),
        "--stages.0.epochs": "1",
        "--stages.1.epochs": "1",
        "--limit-batches": "2",
        "--device": "cpu",
        "--num-workers": "0",
        "--tracker": "none",
    } | {f"--{option.replace('_', '-')}": value for option, value in others.items()}

    def main(options: sweep.Options) -> None:
        sweep.main(options, [word for pair in train_flags.items() for word in pair])

    words = ["--logdir", str(tmp_path / name), *flags]
    return run_train(main, sweep.Options, *words, name="tools/sweep.py", repeats=False)


@pytest.mark.slow
@CLASSES_ONLY
@NEEDS_PROCESSES
def test_trials_of_real_training_run_on_two_ranks_and_are_not_repeated(tmp_path):
    flags = ["--search", "stages.0.lr=1e-5|1e-2", "--sampler", "grid", "--launch", "ddp"]
    end = sweep_over_training(tmp_path, "sweep", *flags)
    assert end.code == 0, end.err + end.out
    records = [json.loads((tmp_path / f"sweep/trial_000{number}/run.json").read_text()) for number in (0, 1)]
    assert [(record["world_size"], record["exit"]) for record in records] == [(2, "finished")] * 2
    scores = [float(row["accuracy"]) for row in read_trials(tmp_path / "sweep")]
    assert scores == [record["best"]["score"] for record in records]
    again = sweep_over_training(tmp_path, "sweep", *flags)
    assert again.code == 0
    assert "trial 0 " not in again.out  # nothing was started


@pytest.mark.slow
@CLASSES_ONLY
@NEEDS_PROCESSES
def test_sweep_of_real_training_finds_a_better_learning_rate_than_a_bad_default(tmp_path):
    short = {"limit_batches": "16", "batch_size": "16"}
    grid = ["--search", "stages.0.lr=1e-6|1e-3", "--sampler", "grid"]
    assert sweep_over_training(tmp_path, "grid", *grid, **short).code == 0
    bad, good = (float(row["accuracy"]) for row in read_trials(tmp_path / "grid"))
    end = sweep_over_training(tmp_path, "sweep", "--search", "stages.0.lr=log(1e-6,1e-2)", "--trials", "4", **short)
    assert end.code == 0, end.err + end.out
    best = max(float(row["accuracy"]) for row in read_trials(tmp_path / "sweep"))
    assert bad < best
    assert good - best < 0.5 * (good - bad)  # most of what the best of the grid gains
