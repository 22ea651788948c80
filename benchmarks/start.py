"""How soon a run starts: a wrong flag said, and the first optimizer step done, beside the imports that it cannot avoid.

    make bench-start

Each is a process of its own; rounds are interleaved. The floor of a wrong flag is `import torch, torchvision`; the
floor of the first step is that, building the data set and the model, and one bare step on a batch.
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

RENDERED = Path(__file__).parent.parent / "{{cookiecutter.project_slug}}"

IMPORTS = "import torch, torchvision"
BARE_STEP = """
import numpy, torch, torchvision
from pathlib import Path
from experiment.augmentations import normalize
from experiment.dataset import load_dataset
from experiment.model import build_criterion, build_model
dataset = load_dataset(Path("data"))
model = build_model(num_classes=len(dataset.classes))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
images, targets = dataset.get_batch(numpy.arange(32))
build_criterion()(model(normalize(images)), targets).backward()
optimizer.step()
"""
# The rendered program, ended by its own loop right after the first step.
FIRST_STEP = """
import os, runpy, sys
from batteries.run.run import Run
Run.log_step = lambda *_: os._exit(0)
split_file = sys.argv[1] + ".csv"
sys.argv = ["train.py", "--device", "cpu", "--tracker", "none", "--logdir", sys.argv[1], "--split-file", split_file]
runpy.run_path("train.py", run_name="__main__")
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    commands = {
        "import torch, torchvision": ["-c", IMPORTS],
        "a wrong flag is said": ["train.py", "--batch-sice", "3"],
        "bare first step": ["-c", BARE_STEP],
        "first optimizer step of train.py": ["-c", FIRST_STEP],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    byte_code = tempfile.mkdtemp()  # as each run after the first finds it, but not within the template
    for number in range(rounds + 1):  # the first round fills it, and the disk's cache
        for name in random.Random(number).sample(list(commands), len(commands)):
            taken = time_command(commands[name], byte_code)
            if number:
                seconds[name].append(taken)
    floors = {
        "a wrong flag is said": "import torch, torchvision",
        "first optimizer step of train.py": "bare first step",
    }
    print(f"{rounds} rounds")
    for name, times in seconds.items():
        floor = seconds[floors.get(name, name)]
        ratio = statistics.median(own / least for own, least in zip(times, floor, strict=True))
        print(f"{name:40} {statistics.median(times):6.2f} s {ratio:6.2f} x {floors.get(name, 'itself')}")


def time_command(arguments: list[str], byte_code: str) -> float:
    """Seconds of one process."""
    environment = os.environ | {"PYTHONPATH": str(RENDERED), "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": byte_code}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments, *([str(Path(folder) / "run")] if FIRST_STEP in arguments else [])]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=RENDERED, env=environment, capture_output=True, text=True)
        taken = time.perf_counter() - begin
    assert done.returncode == (2 if "train.py" in arguments else 0), done.stderr
    return taken


if __name__ == "__main__":
    main()
