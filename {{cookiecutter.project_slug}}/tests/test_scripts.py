"""The launch scripts, as a person would run them: with the real model, from any folder, and stopped halfway."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
from small_data import NEEDS_PATCH, make_data

from batteries.data.splits import SplitFile
from experiment.dataset import load_dataset
from experiment.splits import make_folds

ROOT = Path(__file__).parent.parent
SMOKE = ["--limit-batches", "2", "--stages.0.epochs", "1", "--stages.1.epochs", "1", "--device", "cpu"]
SMOKE += ["--no-report"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the small data can be read in this process alone"),
]


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    splits = tmp_path_factory.mktemp("splits") / "default.csv"
    return ["--data-dir", str(make_data(folder)), "--split-file", str(splits)]


def environment(**extra: str) -> dict[str, str]:
    own = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | own | extra


def run_script(script: Path | str, *flags: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    path = ROOT / "scripts" / script
    return subprocess.run(
        [path, *flags], cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("script", "world_size", "wrapper"),
    [
        ("train_device.sh", 1, "threads, fp32\n"),
        ("train_dp.sh", 1, "threads with DataParallel"),
        ("train_ddp.sh", 2, "threads with DistributedDataParallel, fp32\n"),
    ],
)
def test_each_script_shows_its_command_and_trains_from_any_folder(script, world_size, wrapper, data_flags, tmp_path):
    page = "--report" if world_size > 1 else "--no-report"
    flags = [*SMOKE, *data_flags, "--logdir", str(tmp_path / "run"), page]
    done = run_script(script, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"+ {sys.executable} ")
    said = [line for line in done.stdout.splitlines() if line.startswith(("report", "note"))]
    assert said == [f"report   {tmp_path}/run/report.html"] * (world_size > 1)  # by one process, all of it
    assert (tmp_path / "run/plots/confusion.png").exists() == (world_size > 1)
    assert wrapper in done.stdout
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == world_size
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert "\x1b" not in done.stdout


def test_data_parallel_without_a_gpu_says_so(data_flags, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags = [*SMOKE, *data_flags, "--logdir", str(tmp_path / "run")]
    assert "no GPU" in run_script("train_dp.sh", *flags, folder=tmp_path).stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--logdr", "x"], "--logdr is no flag; did you mean '--logdir'?"),
        (["--batch-size", "33"], "--batch-size 33 must be a multiple of 2 (2 processes x 1 accumulation steps)"),
        (["--data-parallel"], "--data-parallel is for one process"),
    ],
)
def test_bad_input_under_ddp_is_said_once_with_exit_code_2(flags, sentence, data_flags, tmp_path):
    done = run_script("train_ddp.sh", *SMOKE, *data_flags, "--logdir", str(tmp_path / "run"), *flags, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert done.stderr.startswith(f"error: {sentence}")
    assert not (tmp_path / "run").exists()


LONG = ["--device", "cpu", "--limit-batches", "1", "--stages.0.epochs", "1000"]


@contextmanager
def start_job(*command: Path | str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A command whose messages can be read, in a session of its own, which is killed at the end."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(**extra), start_new_session=True, **streams)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_script(script: str, *flags: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """A launch script that trains for long."""
    return start_job(ROOT / "scripts" / script, *flags, *LONG)


def wait_for(name: str, process: subprocess.Popen[str], logdir: Path) -> None:
    """Wait until the run has made this file. Where it never does, the error says where each process was."""
    until = time.monotonic() + 120
    while not (logdir / name).exists():
        if time.monotonic() > until or process.poll() is not None:
            for one in processes_of(logdir):
                os.kill(one, signal.SIGABRT)  # python's faulthandler prints the stacks
            raise AssertionError(f"there is no {name}: {process.poll()} {process.communicate(timeout=30)[1]}")
        time.sleep(0.1)


def test_a_rank_that_is_killed_ends_all_and_it_is_said(data_flags, tmp_path):
    with start_script("train_ddp.sh", *data_flags, "--logdir", str(tmp_path / "run")) as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        os.kill(int(found.split()[-1]), signal.SIGKILL)
        _, messages = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert messages == "error: rank 1 was ended by SIGKILL (is memory short?), and the others with it.\n"
    assert not processes_of(tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_ranks_save_the_run_and_end_when_their_launcher_is_killed(data_flags, tmp_path):
    with start_script("train_ddp.sh", *data_flags, "--logdir", str(tmp_path / "run")) as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        assert len(processes_of(tmp_path / "run")) == 3  # the launcher and two ranks
        os.kill(process.pid, signal.SIGKILL)
        until = time.monotonic() + 60
        while processes_of(tmp_path / "run") and time.monotonic() < until:
            time.sleep(0.1)
        assert not processes_of(tmp_path / "run")
    assert json.loads((tmp_path / "run/run.json").read_text())["exit"] == "preempted by SIGTERM"


def test_a_config_with_a_device_keeps_it_unless_told_otherwise(tmp_path):
    (tmp_path / "config.json").write_text('{"device": "cuda:7"}')
    flags = ["--config", str(tmp_path / "config.json"), "--logdir", str(tmp_path / "run")]
    assert "--device cuda:7 needs GPU 7" in run_script("train_device.sh", *flags, folder=tmp_path).stderr
    assert "--device nowhere" in run_script("train_device.sh", *flags, folder=tmp_path, DEVICE="nowhere").stderr


def test_a_number_of_processes_that_is_none_is_refused(tmp_path):
    done = run_script("train_ddp.sh", folder=tmp_path, NPROC="many")
    assert (done.returncode, done.stderr) == (2, "error: NPROC=many must be a whole number of processes, 1 or more.\n")


def test_a_rank_that_fails_ends_all_with_its_cause_once(data_flags, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("logs", "data", ".venv", ".git", ".variants"))
    with (copy / "experiment/model.py").open("a") as model:
        model.write("\n\nimport os\nassert os.environ.get('RANK') != '1', 'rank 1 broke'\n")
    done = run_script(copy / "scripts/train_ddp.sh", *SMOKE, *data_flags, "--logdir", "run", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("AssertionError: rank 1 broke") == 1
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize(
    ("script", "name", "whom"),
    [
        ("train_device.sh", "SIGINT", "all"),  # as a terminal does: to all processes of the job
        ("train_ddp.sh", "SIGINT", "launcher"),  # as a terminal does: torchrun gives each rank a session of its own
        ("train_ddp.sh", "SIGINT", "all"),
        ("train_ddp.sh", "SIGTERM", "all"),
        ("train_ddp.sh", "SIGTERM", "launcher"),
        ("train_ddp.sh", "SIGUSR1", "launcher"),
        ("train_ddp.sh", "SIGUSR1", "all"),
    ],
)
def test_a_signal_saves_the_run_ends_all_processes_and_is_said_once(script, name, whom, data_flags, tmp_path):
    number = getattr(signal, name)
    with start_script(script, *data_flags, "--logdir", str(tmp_path / "run"), "--num-workers", "1") as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        for receiver in [process.pid] if whom == "launcher" else processes_of(tmp_path / "run"):
            os.kill(receiver, number)
        _, messages = process.communicate(timeout=20)
    assert messages == f"stopped by {name}; the run is saved, --resume goes on with it.\n"
    assert process.returncode == 128 + number
    assert not processes_of(tmp_path / "run")
    assert json.loads((tmp_path / "run/run.json").read_text())["exit"] == f"preempted by {name}"
    ledger = json.loads((tmp_path / "run/stage0/checkpoints.json").read_text())["checkpoints"][-1]
    written = (tmp_path / "run/stage0" / ledger["file"]).read_bytes()
    assert hashlib.sha256(written).hexdigest() == ledger["sha256"]


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3])
def test_ctrl_c_while_train_py_starts_shows_no_traceback(seconds, data_flags, tmp_path):
    with start_script("train_device.sh", *data_flags, "--logdir", str(tmp_path / "run")) as process:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, messages = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in messages


def test_folds_that_were_cut_go_on_and_finished_ones_are_not_trained_again(data_flags, tmp_path):
    splits = tmp_path / "two.csv"
    dataset = load_dataset(Path(data_flags[1]))
    SplitFile(splits, dataset, lambda data: make_folds(data, num_folds=2)).write()
    flags = [*SMOKE, *data_flags, "--split-file", str(splits), "--tracker", "none", "--save-n-best", "1"]
    logdir = tmp_path / "folds"
    with start_job(ROOT / "scripts/train_folds.sh", *flags, f"--logdir={logdir}") as process:
        wait_for("fold_1/stage0/last.pth", process, logdir)
    finished = (logdir / "fold_0/metrics.jsonl").read_bytes(), (logdir / "fold_0/stage1/last.pth").stat().st_mtime_ns
    again = run_script("train_folds.sh", *flags, "--logdir", str(logdir), folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "stage1/epoch_1.pth: finished already" in again.stdout
    assert "fold_1/stage0/epoch_1.pth" in again.stdout
    path = logdir / "fold_0/stage1/last.pth"
    assert ((logdir / "fold_0/metrics.jsonl").read_bytes(), path.stat().st_mtime_ns) == finished
    assert len((logdir / "fold_1/metrics.jsonl").read_text().splitlines()) == 2
    fold_0, fold_1, mean = again.stdout.splitlines()[-3:]
    assert (fold_0[:6], fold_1[:6]) == ("fold 0", "fold 1")
    assert mean.startswith("mean     accuracy 0.")
    with splits.open() as file, (logdir / "predictions/valid.csv").open() as predicted:
        wanted = [row["id"] for row in csv.DictReader(file) if row["fold"] != "-1"]
        assert sorted(row["id"] for row in csv.DictReader(predicted)) == sorted(wanted)


@pytest.mark.parametrize("flag", ["--fold", "--fold=2", "--resume"])
def test_what_train_folds_gives_itself_is_refused(flag, tmp_path):
    done = run_script("train_folds.sh", flag, folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"error: {flag} is given by scripts/train_folds.sh itself" in done.stderr


@pytest.mark.parametrize(("flag", "word"), [("--help", "--logdir PATH"), ("--show-schedule", "stage1")])
def test_train_folds_passes_on_what_train_py_only_says(flag, word, data_flags, tmp_path):
    done = run_script("train_folds.sh", *data_flags, "--logdir", str(tmp_path / "folds"), flag, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert word in done.stdout
    assert not (tmp_path / "folds").exists()


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """What a job of SLURM finds around it: its variables, and stand-ins for its commands, whose calls go to `calls`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    answer = f'#!/bin/sh\n[ "$1" = show ] && printf "first\\nsecond\\n" || echo "$@" >> {tmp_path}/calls\n'
    (commands / "scontrol").write_text(answer)
    for command in commands.iterdir():
        command.chmod(0o755)
    (tmp_path / "calls").touch()
    shutil.copy(ROOT / "scripts/train_slurm.sh", tmp_path / "slurm_script")  # SLURM runs a copy of the script
    names = {"SUBMIT_DIR": str(ROOT), "JOB_NUM_NODES": "1", "JOB_NODELIST": "x", "JOB_ID": "42", "NODEID": "0"}
    variables = {f"SLURM_{name}": value for name, value in names.items()}
    return variables | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}


def test_a_slurm_job_whose_time_is_nearly_over_saves_the_run_and_is_queued_again(data_flags, slurm, tmp_path):
    flags = [*data_flags, *LONG, "--tracker", "none", "--logdir", str(tmp_path / "run")]
    with start_job("bash", tmp_path / "slurm_script", *flags, **slurm) as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        process.send_signal(signal.SIGUSR1)
        _, messages = process.communicate(timeout=30)
    assert messages == "stopped by SIGUSR1; the run is saved, --resume goes on with it.\n"
    assert process.returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "calls").read_text() == "requeue 42\n"
    assert not processes_of(tmp_path / "run")


def test_a_slurm_job_tells_each_machine_its_place_and_goes_on_with_its_run(slurm, tmp_path):
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho $NNODES $NODE_RANK $MASTER_ADDR "$@"\n')
    python.chmod(0o755)
    slurm |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "PYTHON": str(python)}
    done = run_script(tmp_path / "slurm_script", "--logdir", "a b", folder=tmp_path, **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n2 1 first -m batteries.launch train.py --logdir a b --resume\n")
    assert (tmp_path / "calls").read_text() == ""


def processes_of(logdir: Path) -> list[int]:
    """The launcher, ranks and workers whose command names this folder: a rank of torchrun has a session of its own."""
    found = subprocess.run(["pgrep", "-f", str(logdir)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]
