"""What a process does for tests/test_pairs.py in a rendered repository; it has torch already, and knows no test."""

import contextlib
import os
import runpy
import sys
from pathlib import Path


def enter(folder: Path, out: Path) -> None:
    """Make this process one that was started in `folder`, with all that it says in `out`."""
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.stdout = sys.stderr = out.open("w", encoding="utf-8")
    os.environ["COLUMNS"] = "200"
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)


def train_two_epochs(folder: Path, logdir: Path, out: Path) -> None:
    """`train.py` for two epochs, with a small network on small data and the tracker that the repository is made for."""
    enter(folder, out)
    import torch

    torch.set_num_threads(1)
    from models import tiny_network
    from small_data import make_data

    import train
    from batteries.core.command_line import run_command

    train.build_model = tiny_network
    flags = ["--limit-batches", "1", "--batch-size", "8", "--stages.0.epochs", "1", "--stages.1.epochs", "1"]
    flags += ["--data-dir", str(make_data(logdir.with_name(f"{logdir.name}-data"))), "--num-workers", "0"]
    flags += ["--split-file", str(logdir.with_name(f"{logdir.name}.csv")), "--logdir", str(logdir), "--device", "cpu"]
    sys.argv = ["train.py", *flags]
    run_command(train.main, train.Config)


def ask_for_help(folder: Path, out: Path) -> None:
    """`--help` of each verb; what each says begins with a line of its name and exit code."""
    enter(folder, out)
    for verb in sorted(Path().glob("*.py")):
        sys.argv = [verb.name, "--help"]
        code: object = 0
        with contextlib.redirect_stdout(sys.stderr):
            try:
                runpy.run_path(str(verb), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        print(f"[{verb.name} {code}]")
    sys.stdout.flush()
