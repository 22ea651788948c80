"""How long `cookiecutter` takes to render this template, beside one of a single file.

    make bench-render

Each rendering is a process of its own, as a person starts it, from a folder; rounds are interleaved. The floor is a
template of one question and one file of one line, without a hook: what cookiecutter itself needs. It is rendered into
memory where there is /dev/shm: on a disk, what is timed is mostly how long that takes to make a file.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SLUG = "{{cookiecutter.project_slug}}"
MEMORY = Path("/dev/shm")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="where to render")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        templates = {
            "one file": make_small_template(folder / "small"),
            "this template": copy_template(folder / "whole"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in templates}
        for number in range(rounds + 1):  # the first round fills the disk's cache and the byte code
            for name in random.Random(number).sample(list(templates), len(templates)):
                taken = time_rendering(templates[name], folder)
                if number:
                    seconds[name].append(taken)
    print(f"{rounds} rounds in {arguments.folder or tempfile.gettempdir()}")
    for name, times in seconds.items():
        ratio = statistics.median(own / least for own, least in zip(times, seconds["one file"], strict=True))
        print(f"{name:15} {statistics.median(times):6.3f} s {ratio:6.2f} x one file")


def make_small_template(folder: Path) -> Path:
    """The least that cookiecutter renders."""
    (folder / SLUG).mkdir(parents=True)
    (folder / "cookiecutter.json").write_text(json.dumps({"project_slug": "my-experiment"}))
    (folder / SLUG / "train.py").write_text('print("{{ cookiecutter.project_slug }}")\n')
    return folder


def copy_template(folder: Path) -> Path:
    """What git knows of this template."""
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def time_rendering(template: Path, home: Path) -> float:
    """Seconds of one process."""
    with tempfile.TemporaryDirectory(dir=home) as output:
        command = [sys.executable, "-m", "cookiecutter", str(template), "--no-input", "-o", output]
        environment = os.environ | {"HOME": str(home), "USERPROFILE": str(home)}
        begin = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        taken = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    return taken


if __name__ == "__main__":
    main()
