"""The launch scripts as users run them: with the real model, from any directory, and interrupted."""

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
from flags import override
from processes import SECONDS, wait_until
from small_data import NEEDS_PATCH, make_data

from batteries.data.splits import SplitFile
from experiment.augmentations import MEAN
from experiment.dataset import load_dataset
from experiment.splits import make_folds

ROOT = Path(__file__).parent.parent
SMOKE = ["--limit-batches", "2", "--stages.0.epochs", "1", "--stages.1.epochs", "1", "--device", "cpu", "--no-report"]
LONG = ["--device", "cpu", "--limit-batches", "1", "--stages.0.epochs", "1000"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the small data is patched into this process only"),
]


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory) -> list[str]:
    data = make_data(tmp_path_factory.mktemp("data"))
    splits = tmp_path_factory.mktemp("splits") / "default.csv"
    return ["--data-dir", str(data), "--split-file", str(splits)]


def environment(**extra: str) -> dict[str, str]:
    fixed = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | fixed | extra


def run_script(script: Path | str, *flags: str, directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script in `directory` with more environment variables."""
    return run_in(directory, str(ROOT / "scripts" / script), *flags, **variables)


def run_in(directory: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(**variables)
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=SECONDS)


def copy_project(directory: Path) -> Path:
    """Copy this project without runs and data, to modify it."""
    left_out = {"logs", "data", ".venv", ".git", ".variants"}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return left_out.intersection(names) if Path(folder) == ROOT else set()  # batteries/data is copied

    return Path(shutil.copytree(ROOT, directory / "copy", ignore=ignore))


@pytest.mark.parametrize(
    ("script", "world_size", "wrapper"),
    [
        ("train_device.sh", 1, "threads, fp32\n"),
        ("train_dp.sh", 1, "threads with DataParallel"),
        ("train_ddp.sh", 2, "threads with DistributedDataParallel, fp32\n"),
    ],
)
def test_scripts_print_their_command_and_train_from_any_directory(script, world_size, wrapper, data_flags, tmp_path):
    flags = [*SMOKE, *data_flags, "--logdir", str(tmp_path / "run")]
    done = run_script(script, *flags, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"+ {sys.executable} ")
    assert not [line for line in done.stdout.splitlines() if line.startswith(("report", "note"))]
    assert not (tmp_path / "run/plots").exists()
    assert wrapper in done.stdout
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == world_size
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert "\x1b" not in done.stdout


def test_data_parallel_without_a_gpu_is_reported(data_flags, tmp_path):
    flags = [*SMOKE, *data_flags, "--logdir", str(tmp_path / "run")]
    done = run_script("train_dp.sh", *flags, directory=tmp_path)
    assert "with DataParallel, which has no effect without a GPU" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logdr", "x"], "unknown option --logdr; did you mean '--logdir'?"),
        (
            ["--batch-size", "33"],
            "--batch-size 33 must be a multiple of 2 (2 processes x 1 accumulation step); use 32 or 34.",
        ),
        (["--data-parallel"], "--data-parallel needs a single process"),
    ],
)
def test_invalid_input_under_ddp_is_reported_once_with_exit_code_2(flags, message, data_flags, tmp_path):
    flags = [*SMOKE, *data_flags, "--logdir", str(tmp_path / "run"), *flags]
    done = run_script("train_ddp.sh", *flags, directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert done.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


@contextmanager
def start_job(*command: Path | str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a separate session, with its stderr in a pipe; kill the session at the end."""
    process = subprocess.Popen(
        command,
        env=environment(**variables),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_script(script: str, *flags: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """Start a launch script with a long run."""
    return start_job(ROOT / "scripts" / script, *flags, *LONG)


def wait_for(name: str, process: subprocess.Popen[str], logdir: Path) -> None:
    """Wait until the run has written the file `name`; if it never does, fail with the stacks of its processes."""
    end = time.monotonic() + SECONDS / 2
    while not (logdir / name).exists():
        if time.monotonic() > end or process.poll() is not None:
            for process_id in processes_of(logdir):
                os.kill(process_id, signal.SIGABRT)  # Python's faulthandler prints the stacks
            raise AssertionError(f"there is no {name}: {process.poll()} {process.communicate(timeout=SECONDS)[1]}")
        time.sleep(0.1)


def processes_of(logdir: Path) -> list[int]:
    """Return the launcher, ranks and workers with this directory in their command; ranks have separate sessions."""
    found = subprocess.run(["pgrep", "-f", str(logdir)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def test_killed_rank_ends_the_others_and_is_reported(data_flags, tmp_path):
    with start_script("train_ddp.sh", *data_flags, "--logdir", str(tmp_path / "run")) as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        os.kill(int(found.split()[-1]), signal.SIGKILL)
        _, messages = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert messages == "error: rank 1 was ended by SIGKILL (out of memory?); the other ranks were stopped.\n"
    assert not processes_of(tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux notifies a process when its parent dies")
def test_ranks_save_the_run_if_their_launcher_is_killed(data_flags, tmp_path):
    with start_script("train_ddp.sh", *data_flags, "--logdir", str(tmp_path / "run")) as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        assert len(processes_of(tmp_path / "run")) == 3  # the launcher and two ranks
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(tmp_path / "run"), "the end of all processes")
    assert json.loads((tmp_path / "run/run.json").read_text())["exit"] == "preempted by SIGTERM"


def test_device_variable_overrides_the_config_file_only_if_set(tmp_path):
    (tmp_path / "config.json").write_text('{"device": "cuda:7"}')
    flags = ["--config", str(tmp_path / "config.json"), "--logdir", str(tmp_path / "run")]
    assert "--device cuda:7 needs GPU 7" in run_script("train_device.sh", *flags, directory=tmp_path).stderr
    assert "--device nowhere" in run_script("train_device.sh", *flags, directory=tmp_path, DEVICE="nowhere").stderr


def test_python_without_the_dependencies_is_reported_in_one_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    names = ["matplotlib", "numpy", "pandas", "rich", "sklearn", "torch", "torchcodec", "torchvision", "tyro"]
    clean = {"PYTHON": python, "PYTHONPATH": ""}
    for script in ("train_device.sh", "train_ddp.sh", "train_folds.sh"):
        done = run_script(script, "--logdir", str(tmp_path / "run"), directory=tmp_path, **clean)
        fix = f"install the dependencies: {python} -m pip install -e ."
        assert done.stderr == f"error: PYTHON={python} has no {', '.join(names)}; {fix}\n"
        assert (done.returncode, done.stdout) == (2, "")
    for name in names[:-1]:
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    partly = {"PYTHON": python, "PYTHONPATH": str(tmp_path / "packages")}
    done = run_script("train_device.sh", directory=tmp_path, **partly)
    assert done.stderr == f"error: PYTHON={python} has no tyro; {fix}\n"


def test_python_that_does_not_exist_is_reported_in_one_line(tmp_path):
    done = run_script("train_device.sh", directory=tmp_path, PYTHON="nothing")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: PYTHON=nothing does not exist; ")


def test_invalid_number_of_processes_is_rejected(tmp_path):
    done = run_script("train_ddp.sh", directory=tmp_path, NPROC="many")
    assert (done.returncode, done.stderr) == (2, "error: NPROC=many must be an integer, 1 or more.\n")


def test_failed_rank_ends_the_others_and_its_traceback_is_printed_once(data_flags, tmp_path):
    project = copy_project(tmp_path)
    with (project / "experiment/model.py").open("a") as model:
        model.write("\n\nimport os\nassert os.environ.get('RANK') != '1', 'rank 1 broke'\n")
    done = run_script(project / "scripts/train_ddp.sh", *SMOKE, *data_flags, "--logdir", "run", directory=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("AssertionError: rank 1 broke") == 1
    assert done.stderr.count("Traceback") == 1


SKIPPING_MODEL = """
import torch


class Skipping(nn.Module):
    def __init__(self, first, last):
        super().__init__()
        self.first, self.sometimes, self.last = first, nn.Linear(100, 100), last

    def forward(self, images):
        values = self.first(images)
        return self.last(self.sometimes(values) if torch.rand(()) < 0.5 else values)


def build_model(num_classes):
    features = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(FEATURES, 100))
    return Skipping(features, nn.Linear(100, num_classes))
"""


def test_model_that_skips_layers_at_random_is_reported_and_can_be_allowed(data_flags, tmp_path):
    project = copy_project(tmp_path)
    file = project / "experiment/model.py"
    file.write_text(file.read_text() + SKIPPING_MODEL.replace("FEATURES", str(16 * len(MEAN))))
    flags = [*data_flags, "--device", "cpu", "--no-report", "--stages.0.epochs", "2", "--stages.1.epochs", "1"]
    flags += ["--tracker", "none", "--logdir", "run"]
    done = run_script(project / "scripts/train_ddp.sh", *flags, directory=tmp_path)
    assert done.returncode == 1
    message = "these parameters got no gradient in a step, for which DistributedDataParallel waits: sometimes.weight, "
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((project / "run/run.json").read_text())["exit"] is not None
    flags += ["--resume", "--find-unused-parameters"]
    done = run_script(project / "scripts/train_ddp.sh", *flags, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((project / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_launcher_makes_the_project_importable_for_scripts_in_tools(tmp_path):
    project = copy_project(tmp_path)  # not installed, so only PYTHONPATH can lead to its packages
    # One write per rank: torchrun starts them unbuffered, and print would write the end of the line separately.
    line = "f'{batteries.__file__} {os.environ[\"PYTHONPATH\"]}\\n'"
    text = f"import os\nimport batteries\nos.write(1, {line}.encode())\n"
    (project / "tools/probe.py").write_text(text)
    command = [sys.executable, "-m", "batteries.distributed.launch", "tools/probe.py"]
    done = run_in(project, *command, PYTHONPATH="before")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "__init__" in line]
    assert lines == [f"{project}/batteries/__init__.py {project}{os.pathsep}before"] * 2


@pytest.mark.parametrize(
    ("script", "name", "receivers"),
    [
        ("train_device.sh", "SIGINT", "all"),  # a terminal sends it to all processes of the job
        ("train_ddp.sh", "SIGINT", "launcher"),  # a terminal does not reach ranks: torchrun puts them in new sessions
        ("train_ddp.sh", "SIGINT", "all"),
        ("train_ddp.sh", "SIGTERM", "all"),
        ("train_ddp.sh", "SIGTERM", "launcher"),
        ("train_ddp.sh", "SIGUSR1", "launcher"),
        ("train_ddp.sh", "SIGUSR1", "all"),
    ],
)
def test_signal_saves_the_run_ends_all_processes_and_is_reported_once(script, name, receivers, data_flags, tmp_path):
    number = getattr(signal, name)
    with start_script(script, *data_flags, "--logdir", str(tmp_path / "run"), "--num-workers", "1") as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        for receiver in [process.pid] if receivers == "launcher" else processes_of(tmp_path / "run"):
            os.kill(receiver, number)
        _, messages = process.communicate(timeout=SECONDS)
    assert messages == f"stopped by {name}; the run is saved, resume it with --resume.\n"
    assert process.returncode == 128 + number
    assert not processes_of(tmp_path / "run")
    assert json.loads((tmp_path / "run/run.json").read_text())["exit"] == f"preempted by {name}"
    manifest = json.loads((tmp_path / "run/stage0/checkpoints.json").read_text())["checkpoints"][-1]
    written = (tmp_path / "run/stage0" / manifest["file"]).read_bytes()
    assert hashlib.sha256(written).hexdigest() == manifest["sha256"]


@pytest.mark.parametrize("module", ["torch/__init__.py", "torch/nn/__init__.py", "batteries/run/run.py"])
def test_ctrl_c_while_train_py_imports_prints_no_traceback(module, data_flags, tmp_path):
    command = [ROOT / "scripts/train_device.sh", *data_flags, "--logdir", str(tmp_path / "run"), *LONG]
    with start_job(*command, PYTHONVERBOSE="1") as process:  # Python prints the name of each file that it imports
        assert process.stderr is not None
        assert any(module in line for line in process.stderr)
        os.killpg(process.pid, signal.SIGINT)
        _, messages = process.communicate(timeout=SECONDS)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in messages


def test_device_option_takes_precedence_over_the_device_variable(tmp_path):
    for flags in (["--device", "cuda:7"], ["--device=cuda:7"]):
        done = run_script("train_device.sh", *flags, directory=tmp_path, DEVICE="nowhere")
        assert done.stderr.startswith("error: --device cuda:7 needs GPU 7")


def test_logdir_of_the_folds_that_is_given_twice_is_rejected(tmp_path):
    done = run_script("train_folds.sh", "--logdir", "a", "--logdir=b", directory=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --logdir is given twice; give it once.\n")


def test_interrupted_folds_resume_and_finished_folds_are_not_trained_again(data_flags, tmp_path):
    splits = tmp_path / "two.csv"
    dataset = load_dataset(Path(data_flags[1]))
    SplitFile(splits, dataset, lambda data: make_folds(data, num_folds=2)).write()
    flags = override([*SMOKE, *data_flags], ["--split-file", str(splits), "--tracker", "none", "--save-n-best", "1"])
    logdir = tmp_path / "folds"
    with start_job(ROOT / "scripts/train_folds.sh", *flags, f"--logdir={logdir}") as process:
        wait_for("fold_1/stage0/last.pth", process, logdir)
    metrics = (logdir / "fold_0/metrics.jsonl").read_bytes()
    modified_at = (logdir / "fold_0/stage1/last.pth").stat().st_mtime_ns
    again = run_script("train_folds.sh", *flags, "--logdir", str(logdir), directory=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "stage1/epoch_1.pth: already finished" in again.stdout
    assert "fold_1/stage0/epoch_1.pth" in again.stdout
    assert (logdir / "fold_0/metrics.jsonl").read_bytes() == metrics
    assert (logdir / "fold_0/stage1/last.pth").stat().st_mtime_ns == modified_at
    assert len((logdir / "fold_1/metrics.jsonl").read_text().splitlines()) == 2
    fold_0, fold_1, mean = again.stdout.splitlines()[-3:]
    assert (fold_0[:6], fold_1[:6]) == ("fold 0", "fold 1")
    assert mean.startswith("mean     accuracy 0.")
    with splits.open() as file, (logdir / "predictions/valid.csv").open() as predicted:
        expected = [row["id"] for row in csv.DictReader(file) if row["fold"] != "-1"]
        assert sorted(row["id"] for row in csv.DictReader(predicted)) == sorted(expected)


@pytest.mark.parametrize("flag", ["--fold", "--fold=2", "--resume"])
def test_flags_that_train_folds_sets_are_rejected(flag, tmp_path):
    done = run_script("train_folds.sh", flag, directory=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"error: {flag} is set by scripts/train_folds.sh" in done.stderr


@pytest.mark.parametrize(("flag", "word"), [("--help", "--logdir PATH"), ("--show-schedule", "stage1")])
def test_train_folds_passes_on_flags_that_only_print(flag, word, data_flags, tmp_path):
    done = run_script("train_folds.sh", *data_flags, "--logdir", str(tmp_path / "folds"), flag, directory=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert word in done.stdout
    assert not (tmp_path / "folds").exists()


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The variables of a SLURM job, with substitutes for its commands on the PATH; requeues go to the file `calls`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    scontrol = f'#!/bin/sh\n[ "$1" = show ] && printf "first\\nsecond\\n" || echo "$@" >> {tmp_path}/calls\n'
    (commands / "scontrol").write_text(scontrol)
    for command in commands.iterdir():
        command.chmod(0o755)
    (tmp_path / "calls").touch()
    shutil.copy(ROOT / "scripts/train_slurm.sh", tmp_path / "slurm_script")  # SLURM runs a copy of the script
    return {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "x",
        "SLURM_JOB_ID": "42",
        "SLURM_NODEID": "0",
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
    }


def test_slurm_job_near_its_time_limit_saves_the_run_and_is_requeued(data_flags, slurm, tmp_path):
    flags = [*data_flags, *LONG, "--tracker", "none", "--logdir", str(tmp_path / "run")]
    with start_job("bash", tmp_path / "slurm_script", *flags, **slurm) as process:
        wait_for("metrics.jsonl", process, tmp_path / "run")
        process.send_signal(signal.SIGUSR1)
        _, messages = process.communicate(timeout=SECONDS)
    assert messages == "stopped by SIGUSR1; the run is saved, resume it with --resume.\n"
    assert process.returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "calls").read_text() == "requeue 42\n"
    assert not processes_of(tmp_path / "run")


def test_slurm_job_passes_the_node_rank_and_resumes(slurm, tmp_path):
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho $NNODES $NODE_RANK $MASTER_ADDR "$@"\n')
    python.chmod(0o755)
    slurm |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "PYTHON": str(python)}
    done = run_script(tmp_path / "slurm_script", "--logdir", "a b", directory=tmp_path, **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n2 1 first -m batteries.distributed.launch train.py --logdir a b --resume\n")
    done = run_script(tmp_path / "slurm_script", "--resume", "--logdir", "c", directory=tmp_path, **slurm)
    assert done.stdout.endswith("\n2 1 first -m batteries.distributed.launch train.py --resume --logdir c\n")
    assert (tmp_path / "calls").read_text() == ""
