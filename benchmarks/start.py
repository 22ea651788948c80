"""Time until an unknown option is reported, and until the first optimizer step, compared with the unavoidable work.

    make bench-start

Each measurement is a separate process; rounds are interleaved. The reference for an unknown option is `import torch,
torchvision`; for the first step, also building the data set and the model, and one step on a batch.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "{{cookiecutter.project_slug}}"

IMPORTS = "import torch, torchvision"
MINIMAL_STEP = """
import numpy, torch, torchvision
from pathlib import Path
from experiment.augmentations import normalize
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.task import build_criterion
dataset = load_dataset(Path("data"))
model = build_model(num_classes=len(dataset.classes))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
images, targets = dataset.get_batch(numpy.arange(32))
build_criterion()(model(normalize(images)), targets).backward()
optimizer.step()
"""
# train.py, which exits right after the first step.
FIRST_STEP = """
import os, runpy, sys
from batteries.run.stage import StageRun
StageRun.log_step = lambda *_: os._exit(0)
split_file = sys.argv[1] + ".csv"
sys.argv = ["train.py", "--device", "cpu", "--tracker", "none", "--logdir", sys.argv[1], "--split-file", split_file]
runpy.run_path("train.py", run_name="__main__")
"""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    commands = {
        "import torch, torchvision": ["-c", IMPORTS],
        "unknown option is reported": ["train.py", "--batch-sice", "3"],
        "bare first step": ["-c", MINIMAL_STEP],
        "first optimizer step of train.py": ["-c", FIRST_STEP],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    byte_code = tempfile.mkdtemp()  # as after the first run, but outside the template
    for number in range(rounds + 1):  # the first round fills it and the disk cache
        for name in random.Random(number).sample(list(commands), len(commands)):
            taken = time_command(commands[name], byte_code)
            if number:
                seconds[name].append(taken)
    floors = {
        "unknown option is reported": "import torch, torchvision",
        "first optimizer step of train.py": "bare first step",
    }
    print(f"{rounds} rounds")
    for name, times in seconds.items():
        floor = seconds[floors.get(name, name)]
        ratio = statistics.median(value / reference for value, reference in zip(times, floor, strict=True))
        print(f"{name:40} {statistics.median(times):6.2f} s {ratio:6.2f} x {floors.get(name, 'itself')}")


def time_command(arguments: list[str], byte_code: str) -> float:
    """Return the seconds of one process."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": byte_code}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments]
        if FIRST_STEP in arguments:
            command.append(str(Path(folder) / "run"))
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        taken = time.perf_counter() - begin
    assert done.returncode == (2 if "train.py" in arguments else 0), done.stderr
    return taken


if __name__ == "__main__":
    main()
