"""The statements in the template's README, CONTRIBUTING, CHANGELOG, CITATION and benchmarks are true."""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from options import CHOICES, QUESTIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


def test_every_link_to_a_file_is_valid():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for bracketed, plain in re.findall(r"\]\((?:<([^>]+)>|(?!http|#)([^)\s]+))\)", text):
            assert ((ROOT / document).parent / (bracketed or plain)).exists(), f"{document}: {bracketed or plain}"


def test_the_readme_lists_every_question_and_every_answer():
    table = README.partition("## Template options")[2].partition("\n## ")[0]
    listed = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `")))
    assert set(listed) == {name for name in QUESTIONS if not name.startswith("_")}
    for question, answers in CHOICES.items():
        [row] = re.findall(rf"^\| `{question}` \|(.*)\|$", table, re.MULTILINE)
        named = set(re.findall(r"[\w.-]+", row))
        assert set(answers) <= named, question


def test_every_make_target_in_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: ([a-z-]+)", makefile, re.MULTILINE))
    benchmarks = re.search(r"^BENCHMARKS := (.*)$", makefile, re.MULTILINE)
    targets |= {f"bench-{name}" for name in benchmarks[1].split()}
    for document in DOCUMENTS:
        named = re.findall(r"(?:`|^)make ([a-z_-]+)\b", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) - {"bench-NAME", "bench-"} <= targets, document
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(benchmarks[1].split())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_replaces_its_directory_and_make_clean_deletes_it(template, tmp_path):
    folder = shutil.copytree(template, tmp_path / "batteries")
    uv = tmp_path / "bin/uv"  # instead of uv, which would download torch
    uv.parent.mkdir()
    uv.write_text(
        f'''#!/bin/sh
        case "$1" in
        tool) shift 3; exec "{sys.executable}" -m cookiecutter "$@" ;;
        run) mkdir -p logs/baseline; touch logs/baseline/metrics.jsonl ;;
        esac
        '''.replace("        ", "").lstrip()
    )
    uv.chmod(0o755)
    environment = os.environ | {"PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path / "home")}
    environment.pop("PYTHON", None)
    for _ in range(2):
        done = subprocess.run(["make", "demo"], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [path.relative_to(folder).as_posix() for path in folder.glob("build/*")] == ["build/demo"]
        assert "metrics.jsonl" in done.stdout
    assert "GB in `build/demo`" in README
    done = subprocess.run(["make", "clean"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("build/*"))


def test_the_version_is_the_same_in_all_files():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]


def test_the_code_excerpt_in_the_readme_is_that_of_train_py():
    excerpt = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    train = (ROOT / "{{cookiecutter.project_slug}}/train.py").read_text(encoding="utf-8")
    function = re.search(r"^def train_fn\(.*?(?=^def )", train, re.DOTALL | re.MULTILINE)[0]
    assert textwrap.indent(excerpt, "    ") in function
    assert len(excerpt.splitlines()) >= 10


def test_the_readme_links_a_test_for_every_guarantee():
    guarantees = README.partition("## Guarantees")[2].partition("\n## ")[0]
    bullets = re.findall(r"^- (.+(?:\n  .+)*)", guarantees, re.MULTILINE)
    assert len(bullets) == 6
    for bullet in bullets:
        assert re.search(r"\]\(<[^>]+/tests/test_\w+\.py>\)", bullet), bullet


def test_files_that_users_edit_are_short():
    project = ROOT / "{{cookiecutter.project_slug}}"
    assert (project / "train.py").read_text(encoding="utf-8").count("\n") <= 350
    for file in [project / "train.py", *project.glob("tools/*.py"), *project.rglob("experiment/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or node.lineno) - node.lineno < 60, f"{file}: {node.name}"
