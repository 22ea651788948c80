"""Time that `cookiecutter` takes to generate a repository, compared with a template of a single file.

    make bench-render

Each measurement is a separate process, from a directory; rounds are interleaved. The reference is a template with one
question and one file of one line, without a hook: the time of cookiecutter itself. Repositories are generated in
/dev/shm if it exists: on a disk, most of the time is the creation of files.
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
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="where to generate")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        templates = {
            "one file": make_small_template(folder / "small"),
            "this template": copy_template(folder / "complete"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in templates}
        for number in range(rounds + 1):  # the first round fills the disk cache and the byte code
            for name in random.Random(number).sample(list(templates), len(templates)):
                taken = time_rendering(templates[name], folder)
                if number:
                    seconds[name].append(taken)
    print(f"{rounds} rounds in {arguments.folder or tempfile.gettempdir()}")
    for name, times in seconds.items():
        ratio = statistics.median(
            value / reference for value, reference in zip(times, seconds["one file"], strict=True)
        )
        print(f"{name:15} {statistics.median(times):6.3f} s {ratio:6.2f} x one file")


def make_small_template(folder: Path) -> Path:
    """Write a minimal template."""
    (folder / SLUG).mkdir(parents=True)
    (folder / "cookiecutter.json").write_text(json.dumps({"project_slug": "my-experiment"}))
    (folder / SLUG / "train.py").write_text('print("{{ cookiecutter.project_slug }}")\n')
    return folder


def copy_template(folder: Path) -> Path:
    """Copy the tracked files of this template."""
    command = ["git", "ls-files", "-z"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def time_rendering(template: Path, home: Path) -> float:
    """Return the seconds of one process."""
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
