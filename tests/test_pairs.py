"""Every data set trains with every tracker in a generated repository, and every command prints its help."""

import json
import math
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import pairs
import pytest
from options import CHOICES, COMBINATIONS

pytestmark = pytest.mark.slow

SECONDS = 500  # generous: the machine may be slow or busy
CURVES = {
    "tensorboard": "tensorboard/events.out.tfevents.*",
    "tensorboardx": "tensorboardx/events.out.tfevents.*",
    "wandb": "wandb/offline-run-*/run-*.wandb",
}


@pytest.fixture(scope="module")
def run() -> Callable[..., int | None]:
    """Run a function in a separate process, forked from one that has imported torch; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "sklearn.datasets", "tyro", "pandas"])

    def call(function: Callable[..., None], *arguments: Path) -> int | None:
        process = context.Process(target=function, args=arguments)
        process.start()
        process.join(SECONDS)
        process.kill()
        return process.exitcode

    return call


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """One directory for all runs, so that MLflow creates the tables of its store once."""
    return tmp_path_factory.mktemp("logs")


@pytest.mark.parametrize("tracker", CHOICES["tracker"])
@pytest.mark.parametrize(("task", "data_set"), COMBINATIONS)
def test_every_data_set_trains_two_epochs_with_every_tracker(render, run, logs, task, data_set, tracker):
    folder, logdir = render(task=task, data_set=data_set, tracker=tracker), logs / f"{task}-{data_set}-{tracker}"
    out = logs / "out.txt"
    assert run(pairs.train_two_epochs, folder, logdir, out) == 0, out.read_text()[-3000:]
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [("stage0", 1), ("stage1", 1)]
    assert all(math.isfinite(line["train"]["loss"]) for line in lines)
    assert json.loads((logdir / "config.json").read_text())["tracker"] == [tracker]
    assert " is left " not in (logdir / "train.log").read_text()  # as a tracker is that fails
    found = {name for name, pattern in CURVES.items() if [*logdir.glob(pattern)]}
    store = logs / "mlflow.db"  # beside all runs, with a name for each
    if store.exists() and logdir.name.encode() in store.read_bytes():
        found.add("mlflow")
    assert found == {tracker} - {"none"}


@pytest.mark.parametrize(("task", "data_set"), COMBINATIONS)
def test_every_command_prints_its_help(render, run, tmp_path, task, data_set):
    folder, out = render(task=task, data_set=data_set, tracker="none"), tmp_path / "out.txt"
    assert run(pairs.print_help, folder, out) == 0, out.read_text()
    text = out.read_text()
    commands = pairs.commands(folder)
    assert len(commands) >= 10
    for command in commands:
        assert f"[{command} 0]" in text
        assert re.search(rf"usage: {command} ", text), text
