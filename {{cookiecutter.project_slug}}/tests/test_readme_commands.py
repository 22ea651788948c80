"""The commands of README.md, AGENTS.md and docs/*.md run: each page in a copy of this repository, with short runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from documents import (
    ROOT,
    SHORT,
    WITHOUT_REPORT,
    code_blocks,
    commands,
    copy_repository,
    copy_trained_repository,
    page_paths,
    read_page,
    run_commands,
    section,
)
from small_data import NEEDS_PATCH

from experiment import task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
    pytest.mark.skipif(NEEDS_PATCH, reason="the test data can be read in this process only"),
]


@pytest.fixture
def empty(tmp_path) -> Path:
    """A copy of this repository without runs."""
    return copy_repository(tmp_path / "copy")


@pytest.fixture(scope="module")
def trained_copy(tmp_path_factory) -> Path:
    """A copy of this repository with a finished run in logs/baseline, whose first stage has two checkpoints."""
    return copy_trained_repository(tmp_path_factory.mktemp("trained") / "copy")


@pytest.fixture
def trained(trained_copy, tmp_path) -> Path:
    """A copy of this repository with a finished run in logs/baseline."""
    return shutil.copytree(trained_copy, tmp_path / "copy")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def outcomes(copy: Path) -> dict[str, str]:
    """Return how each run ended, by its path in logs/."""
    return {
        path.parent.relative_to(copy / "logs").as_posix(): read_json(path)["exit"]
        for path in (copy / "logs").rglob("run.json")
    }


def test_every_page_with_commands_is_tested():
    sources = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    tested = set(re.findall(r'(?:commands\(|^PAGE = )"([\w/]+\.md)"', sources, re.MULTILINE))
    assert {page for page in page_paths() if code_blocks(read_page(page), "bash")} <= tested


def test_readme_quick_start_trains_and_the_run_directory_is_as_listed(empty):
    done = run_commands(commands("README.md"), empty, SHORT)
    assert "already finished" in done.stdout
    assert outcomes(empty) == {"baseline": "finished"}
    tree = section(read_page("README.md"), "Run directory")
    listed = {name.rstrip("/") for line in tree.splitlines() for name in names_in_line(line)}
    made = {path.name for path in (empty / "logs/baseline").iterdir() if not path.name.startswith(".")}
    tracker = {"tensorboard"} if "{{" in tree else set()  # listed by an expression until the template is rendered
    assert made <= listed | tracker
    assert listed - made <= {"git.diff", "skipped.json", "predictions"}
    stage = {path.name for path in (empty / "logs/baseline/stage0").iterdir()}
    assert stage == {"best.pth", "last.pth", "epoch_1.pth", "checkpoints.json"}


def names_in_line(line: str) -> list[str]:
    """List the file names at the start of a line of a drawn tree."""
    names = []
    for word in line.partition("── ")[2].split():
        if not re.fullmatch(r"\w+/|\w+\.\w+", word):
            break
        names.append(word)
    return names


def test_agents_commands_run(empty):
    done = run_commands(commands("AGENTS.md"), empty, WITHOUT_REPORT)
    assert " passed" in done.stdout
    assert outcomes(empty) == {"smoke": "finished"}
    assert (empty / "logs/smoke/predictions/valid.csv").exists()


def test_data_commands_run(empty):
    done = run_commands(commands("docs/data.md"), empty)
    assert re.search(r"^MEAN = \(", done.stdout, re.MULTILINE)
    assert {path.name for path in (empty / "splits").glob("*.csv")} == {"default.csv", "two.csv"}
    assert (empty / "logs/preview.png").exists()


def test_training_commands_run(empty):
    done = run_commands(commands("docs/training.md"), empty, WITHOUT_REPORT)
    assert "learning rate" in done.stdout
    network = "wide" if task.PREDICTIONS == "mask" else "resnet34"
    assert outcomes(empty) == dict.fromkeys(("smoke", "stages", "again", network), "finished")
    first, again = (read_json(empty / f"logs/{name}/config.json") for name in ("stages", "again"))
    assert first | {"logdir": "logs/again"} == again
    metrics = [(empty / f"logs/{name}/metrics.jsonl").read_bytes() for name in ("stages", "again")]
    assert metrics[0] == metrics[1]


def test_distributed_commands_run(empty):
    run_commands(commands("docs/distributed.md"), empty, WITHOUT_REPORT)
    assert outcomes(empty) == dict.fromkeys(("ddp", "dp"), "finished")
    for name in ("ddp", "dp"):
        config = read_json(empty / f"logs/{name}/config.json")
        assert read_json(empty / f"logs/{name}/run.json")["world_size"] == (2 if name == "ddp" else 1)
        assert config["data_parallel"] == (name == "dp")
        assert [stage["name"] for stage in config["stages"]] == ["stage0", "stage1"]
        assert len((empty / f"logs/{name}/metrics.jsonl").read_text().splitlines()) == 2


def test_interrupted_run_is_resumed_by_the_commands_on_checkpoints(empty):
    code = commands("docs/checkpoints.md")
    assert "-s USR1 60 " in code
    run_commands(code.replace("-s USR1 60 ", "-s USR1 4 "), empty, WITHOUT_REPORT)
    assert outcomes(empty) == {"interrupted": "finished"}
    assert len((empty / "logs/interrupted/metrics.jsonl").read_text().splitlines()) == 2


def test_evaluation_commands_run(trained):
    run_commands(commands("docs/evaluation.md"), trained, WITHOUT_REPORT)
    for name in ("baseline/predictions", "flipped", "swa", "folds/predictions"):
        assert (trained / f"logs/{name}/valid.csv").exists(), name
    assert (trained / "logs/baseline/stage0/swa.pth").exists()
    assert outcomes(trained) == dict.fromkeys(("baseline", "folds/fold_0", "folds/fold_1"), "finished")


@pytest.mark.skipif("{{" in (ROOT / "pyproject.toml").read_text(), reason="the template is not rendered")
def test_installation_with_pip_needs_no_uv(empty):
    """Without the download of dependencies: the new environment finds those of this one."""
    [code] = code_blocks(section(read_page("docs/installation.md"), "With pip"), "sh")
    lines = code.splitlines()
    assert [line.split()[0] for line in lines] == ["python3", ".venv/bin/pip", "PYTHON=.venv/bin/python"]
    subprocess.run([sys.executable, *lines[0].split()[1:]], cwd=empty, check=True)
    [packages] = (empty / ".venv").glob("lib/python*/site-packages")
    (packages / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = lines[1].replace("install ", "install --no-deps ")
    done = subprocess.run(install.split(), cwd=empty, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    python = str(empty / ".venv/bin/python")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = f"{lines[2]} {WITHOUT_REPORT} --tracker none"
    path = {"PYTHONPATH": str(empty / "tests")}  # of the small network
    done = subprocess.run(command, shell=True, cwd=empty, env=clean | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = [python, str(empty / "tools/predict.py"), "--run", str(empty / "logs/baseline"), "--device", "cpu"]
    done = subprocess.run(tool, cwd=empty.parent, env=clean | path, capture_output=True, text=True)
    assert (empty / "logs/baseline/predictions/test.csv").exists(), done.stderr
    module = [python, "-m", "tools.split", "--help"]
    assert subprocess.run(module, cwd=empty, env=clean | path, capture_output=True).returncode == 0
