"""What a new user sees, and when: the template is rendered, the environment made, and a model trained.

    make bench-first_minute

Prints the seconds of each step, and draws what the terminal said into .github/first-minute.svg, for README. Nothing is
made up: each line was printed by the command above it, in this order. The template is a clone of the last commit, and
uv takes packages from its cache where it has them.
"""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / ".github/first-minute.svg"
WIDTH = 108


def main() -> None:
    """Run, draw, and print the table."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["git", "clone", "--quiet", ROOT, folder / "batteries"], check=True)
        rendered, _ = show(console, "uvx cookiecutter batteries --no-input", folder)
        begin = time.perf_counter()
        subprocess.run(["uv", "sync", "--quiet"], cwd=folder / "my-experiment", env=environment(), check=True)
        synced = time.perf_counter() - begin
        trained, first_epoch = show(console, "cd my-experiment && scripts/train_device.sh", folder, "stage0 1/6  acc")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="the first minute"), flags=re.DOTALL)
    PICTURE.write_text(svg, encoding="utf-8")  # without fonts that would come by network
    for step, seconds in {
        "cookiecutter renders": rendered,
        "uv makes the environment": synced,
        "the first epoch is over": first_epoch,
        "the run is over": trained,
    }.items():
        print(f"{step:26} {seconds:6.1f} s")


def show(console: Console, command: str, folder: Path, mark: str = "\n") -> tuple[float, float]:
    """Run a command and record what it says; its seconds, and those until a line begins with `mark`."""
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    begin, marked = time.perf_counter(), 0.0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment(), **pipes) as process:
        for line in process.stdout:
            console.print(Text(line.rstrip()))
            if line.startswith(mark) and not marked:
                marked = time.perf_counter() - begin
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    return time.perf_counter() - begin, marked


def environment() -> dict[str, str]:
    """That of a terminal as wide as the picture, in which no environment is active."""
    left_out = ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "UV_NO_SYNC", "PYTHON")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"COLUMNS": str(WIDTH)}


if __name__ == "__main__":
    main()
