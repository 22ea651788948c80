"""Time of the first steps of a new user: generate a repository, install its environment, train.

    make bench-first_minute

Prints the seconds of each step, and draws the output of the commands into .github/first-minute.svg for README.md. The
template is a clone of the last commit, and uv takes packages from its cache.
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
DRAWING = ROOT / ".github/first-minute.svg"
WIDTH = 108


def main() -> None:
    """Run the steps, draw the terminal and print the table."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["git", "clone", "--quiet", ROOT, folder / "batteries"], check=True)
        generated, _ = show(console, "uvx cookiecutter batteries --no-input", folder)
        begin = time.perf_counter()
        subprocess.run(["uv", "sync", "--quiet"], cwd=folder / "my-experiment", env=environment(), check=True)
        synced = time.perf_counter() - begin
        trained, first_epoch = show(console, "cd my-experiment && scripts/train_device.sh", folder, "stage0 1/6  acc")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="the first minute"), flags=re.DOTALL)
    DRAWING.write_text(svg, encoding="utf-8")  # without fonts, which would be loaded from the network
    for step, seconds in {
        "cookiecutter generates": generated,
        "uv creates the environment": synced,
        "the first epoch ends": first_epoch,
        "the run ends": trained,
    }.items():
        print(f"{step:26} {seconds:6.1f} s")


def show(console: Console, command: str, folder: Path, mark: str = "\n") -> tuple[float, float]:
    """Run a command and record its output; return its seconds, and those until a line that begins with `mark`."""
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    begin = time.perf_counter()
    marked = 0.0
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            console.print(Text(line.rstrip()))
            if line.startswith(mark) and not marked:
                marked = time.perf_counter() - begin
    assert process.returncode == 0, f"{command} failed with exit code {process.returncode}"
    return time.perf_counter() - begin, marked


def environment() -> dict[str, str]:
    """Return the variables of a terminal as wide as the drawing, without an active Python environment."""
    removed = ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "UV_NO_SYNC", "PYTHON")
    return {name: value for name, value in os.environ.items() if name not in removed} | {"COLUMNS": str(WIDTH)}


if __name__ == "__main__":
    main()
