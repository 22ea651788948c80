"""Functions that tests/test_pairs.py runs in a generated repository, in processes that have imported torch already."""

import contextlib
import os
import runpy
import sys
from pathlib import Path


def enter(folder: Path, out: Path) -> None:
    """Make this process behave like one that was started in `folder`, with its output in `out`."""
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.stdout = sys.stderr = out.open("w", encoding="utf-8")
    os.environ["COLUMNS"] = "200"
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)


def train_two_epochs(folder: Path, logdir: Path, out: Path) -> None:
    """Run `train.py` for two epochs, with a small network, small data and the tracker of the repository."""
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


def print_help(folder: Path, out: Path) -> None:
    """Run train.py and each tool with `--help`; write a line with the path and the exit code after each."""
    enter(folder, out)
    for command in commands(Path()):
        sys.argv = [str(command), "--help"]
        code: object = 0
        with contextlib.redirect_stdout(sys.stderr):
            try:
                runpy.run_path(str(command), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        print(f"[{command} {code}]")
    sys.stdout.flush()


def commands(folder: Path) -> list[Path]:
    """List the Python commands of a generated repository, relative to `folder`."""
    tools = sorted(path.relative_to(folder) for path in folder.glob("tools/*.py") if path.stem != "__init__")
    return [Path("train.py"), *tools]
