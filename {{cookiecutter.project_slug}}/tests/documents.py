"""README.md, AGENTS.md and docs/*.md, as the tests of documents read them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from flags import override
from small_data import make_data

ROOT = Path(__file__).parent.parent
BLOCK = "# {" + "%"  # begins a Jinja block: the documents have blocks until the template is rendered
INTRODUCTION = "\n\nThis repository trains"  # follows the title and the description, which are user-owned
SHORT = "--limit-batches 2 --stages.0.epochs 1 --stages.1.epochs 1 --save-n-best 1 --device cpu"
WITHOUT_REPORT = f"{SHORT} --no-report"
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def page_paths() -> list[str]:
    """List the documents, relative to the root."""
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return ["README.md", "AGENTS.md", *pages]


def read_page(name: str) -> str:
    """Return the text of a document without Jinja block lines and, for README, without title and description."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "README.md":
        _, start, rest = text.partition(INTRODUCTION)
        text = start.lstrip() + rest
    return "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith(BLOCK))


def code_blocks(text: str, language: str) -> list[str]:
    """List the fenced code blocks of a language; bash blocks are run by tests, sh blocks cannot be."""
    return [code for found, code in FENCE.findall(text) if found == language]


def commands(page: str) -> str:
    """Return the bash code blocks of a page."""
    return "\n".join(code_blocks(read_page(page), "bash"))


def without_code_blocks(text: str) -> str:
    """Remove all fenced code blocks."""
    return FENCE.sub("", text)


def section(text: str, title: str) -> str:
    """Return the section with a title of level 2, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def exists(path: str) -> bool:
    """Return whether a path exists in this repository, or in the template for some of its answers."""
    return (ROOT / path).exists() or any(ROOT.glob(f".variants/*/*/{path}"))


def copy_repository(target: Path) -> Path:
    """Copy this repository without runs, data and split files, with small test data and a small network."""
    shutil.copytree(ROOT, target, ignore=_ignore)
    make_data(target / "data")
    (target / "data").mkdir(exist_ok=True)
    with (target / "experiment/model.py").open("a") as model:
        model.write("\n\nfrom models import any_network as build_model\n")
    return target


def copy_trained_repository(target: Path) -> Path:
    """Copy this repository and train logs/baseline in it; its first stage has two checkpoints."""
    copy = copy_repository(target)
    run_commands("scripts/train_device.sh", copy, WITHOUT_REPORT.replace("--stages.0.epochs 1", "--stages.0.epochs 2"))
    return copy


def _ignore(directory: str, names: list[str]) -> list[str]:
    made = ("logs", "data", "uv.lock") if Path(directory) == ROOT else ()
    return [name for name in names if name in made or name.startswith((".", "__pycache__")) or name.endswith(".csv")]


def run_commands(code: str, directory: Path, train_flags: str = "") -> subprocess.CompletedProcess[str]:
    """Run the commands of a document in a copy of this repository, with this Python and without uv.

    Args:
        code: One or more bash code blocks.
        directory: The copy.
        train_flags: Options for each launch script, which make training short; they replace its own.
    """

    def change_flags(found: re.Match[str]) -> str:
        return f"{found[1]} {' '.join(override(found[2].split(), train_flags.split()))} "

    code = re.sub(r"(scripts/train_\w+\.sh)(.*?)(?=$|\|\||  #)", change_flags, code, flags=re.MULTILINE)
    code = re.sub(
        r"uv run (python|pytest)\b", lambda found: f"{sys.executable} {'-m pytest' * (found[1] == 'pytest')}", code
    )
    search_path = os.pathsep.join([str(directory), str(directory / "tests")])
    environment = {"PYTHON": sys.executable, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{code}"],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
