"""A rendered repository knows where it came from; `cruft` brings it what is new, and leaves its owner's files alone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import SLUG, commit_all, files_in, git, run_cruft

ANSWERS = {"data_set": "csv", "tracker": "none", "ci": "gitlab", "author": 'Åsa "Ö" O\'Neill'}
# What the present says, and what the last release said; found by the beginning of a line.
OLDER = {
    "batteries/errors.py": ("class BadInput", "class BadInput(Exception):  # of the last release"),
    "scripts/common.sh": ("set -euo", "set -eu  # of the last release"),
    "README.md": ("## Promises", "## Promises of the last release"),
    "train.py": ("def main(", "def main(config: Config) -> float:  # of the last release"),
    ".variants/data_set/image_folder/experiment/model.py": (
        "def build_model",
        "def build_model(num_classes):  # of the last release",
    ),
}
# What the owner of a repository changes in train.py, and nothing near it is new.
KNOBS = {
    "batch_size: Count = 32": "batch_size: Count = 48",
    "clip_norm: Positive | None = None": "clip_norm: Positive | None = 1.0",
}
KNOBS |= {'optimizer: Literal["adamw", "sgd"] = "adamw"': 'optimizer: Literal["adamw", "sgd"] = "sgd"'}


def change_line(path: Path, beginning: str, line: str) -> None:
    """Put `line` for the one that begins so."""
    text, times = re.subn(rf"^{re.escape(beginning)}.*$", lambda _: line, path.read_text(encoding="utf-8"), flags=re.M)
    assert times == 1, f"{beginning} is found {times} times in {path}"
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def history(template, tmp_path_factory) -> Path:
    """The template as a git repository: a release v0.1.0, and the present after it."""
    folder = tmp_path_factory.mktemp("history") / "batteries"
    shutil.copytree(template, folder)
    git(folder, "init", "-q", "-b", "main")
    for name, (beginning, line) in OLDER.items():
        change_line(folder / SLUG / name, beginning, line)
    (folder / SLUG / "batteries/gone.py").write_text('"""A module that has since gone."""\n')
    (folder / SLUG / "batteries/ledger.py").unlink()
    commit_all(folder, "release")
    git(folder, "tag", "v0.1.0")
    for name in [*(f"{SLUG}/{name}" for name in OLDER), f"{SLUG}/batteries/ledger.py"]:
        shutil.copy2(template / name, folder / name)
    (folder / SLUG / "batteries/gone.py").unlink()
    commit_all(folder, "present")
    return folder


@pytest.fixture
def project(history, run_cookiecutter, tmp_path) -> Path:
    """A repository that was rendered from the last release and committed."""
    done = run_cookiecutter(f"git+file://{history}", tmp_path, "--checkout", "v0.1.0", **ANSWERS)
    assert done.returncode == 0, done.stderr
    git(tmp_path / "my-experiment", "init", "-q")
    commit_all(tmp_path / "my-experiment", "rendered")
    return tmp_path / "my-experiment"


def edit(folder: Path) -> None:
    """What its owner does to a repository."""
    for knob, changed in KNOBS.items():
        text = (folder / "train.py").read_text(encoding="utf-8")
        assert text.count(knob) == 1, knob
        (folder / "train.py").write_text(text.replace(knob, changed), encoding="utf-8")
    (folder / "experiment/model.py").write_text("def build_model(num_classes): return mine(num_classes)\n")
    (folder / "experiment/mine.py").write_text("def mine(num_classes): ...\n")
    (folder / "notes.md").write_text("What I found.\n")
    (folder / "scripts/train_dp.sh").unlink()


def update(project: Path) -> subprocess.CompletedProcess[str]:
    return run_cruft("update", "--skip-apply-ask", home=project.parent, folder=project)


def test_an_edited_repository_gets_what_is_new_and_keeps_what_is_its_owners(project, render):
    edit(project)
    commit_all(project, "mine")
    done = update(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not git(project, "diff", "--name-only", "--diff-filter=U")

    # The same edits in a fresh repository of the present.
    oracle = project.parent / "oracle"
    shutil.copytree(render(**ANSWERS), oracle)
    edit(oracle)
    found = files_in(project)
    assert json.loads(found.pop(".cruft.json"))["commit"]
    assert found == files_in(oracle)


def test_a_conflict_is_where_both_changed_the_same_line_and_nowhere_else(project, render):
    edit(project)
    change_line(project / "train.py", "def main(", "def main(config: Config) -> float:  # mine")
    commit_all(project, "mine")
    update(project)
    assert git(project, "diff", "--name-only", "--diff-filter=U").split() == ["train.py"]

    text = (project / "train.py").read_text(encoding="utf-8")
    ours, theirs = "def main(config: Config) -> float:  # mine\n", "def main(config: Config) -> float:\n"
    conflicts = re.findall(r"^<<<<<<<.*\n((?:.*\n)*?)=======\n((?:.*\n)*?)>>>>>>>.*\n", text, re.MULTILINE)
    assert conflicts == [(ours, theirs)]
    oracle = project.parent / "oracle"
    shutil.copytree(render(**ANSWERS), oracle)
    edit(oracle)
    merged = re.sub(r"^<<<<<<<.*\n(?:.*\n)*?=======\n((?:.*\n)*?)>>>>>>>.*\n", r"\1", text, flags=re.MULTILINE)
    assert merged == (oracle / "train.py").read_text(encoding="utf-8")
    left_out = ("train.py", ".cruft.json")
    found, wanted = files_in(project), files_in(oracle)
    assert {name: found[name] for name in found if name not in left_out} == {
        name: wanted[name] for name in wanted if name not in left_out
    }


def test_cruft_check_tells_whether_there_is_something_new(project, history):
    old = run_cruft("check", home=project.parent, folder=project)
    assert (old.returncode, "out of date" in old.stdout) == (1, True)
    assert update(project).returncode == 0
    commit_all(project, "updated")
    new = run_cruft("check", home=project.parent, folder=project)
    assert (new.returncode, "up to date" in new.stdout) == (0, True)
    record = json.loads((project / ".cruft.json").read_text(encoding="utf-8"))
    assert record["commit"] == git(history, "rev-parse", "HEAD").strip()


def test_the_record_is_what_cruft_itself_would_write(released, run_cookiecutter, tmp_path):
    source = f"file://{released}"
    assert run_cookiecutter(f"git+{source}", tmp_path, "--checkout", "v0.1.0", **ANSWERS).returncode == 0
    ours = json.loads((tmp_path / "my-experiment/.cruft.json").read_text(encoding="utf-8"))
    extra = ["--extra-context", json.dumps(ANSWERS), "--checkout", "v0.1.0", "--output-dir", str(tmp_path / "cruft")]
    assert run_cruft("create", source, "-y", *extra, home=tmp_path).returncode == 0
    theirs = json.loads((tmp_path / "cruft/my-experiment/.cruft.json").read_text(encoding="utf-8"))
    assert ours["template"] == source
    for record in (ours, theirs):  # cruft makes a path of file://, and keeps private variables that it never reads
        record["template"] = str(released)
        answers = record["context"].pop("cookiecutter")
        record["answers"] = {name: answer for name, answer in answers.items() if not name.startswith("_")}
        assert answers["_commit"] == record["commit"] == git(released, "rev-parse", "HEAD").strip()
    assert ours == theirs


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://ada:secret@example.org/ada/batteries.git", "https://example.org/ada/batteries.git"),
        ("git@example.org:ada/batteries.git", "git@example.org:ada/batteries.git"),
        ("ssh://git@example.org/ada/batteries", "ssh://git@example.org/ada/batteries"),
    ],
)
def test_the_record_names_the_origin_of_a_clone_without_a_password(
    released, run_cookiecutter, tmp_path, origin, address
):
    git(tmp_path, "clone", "-q", str(released), "clone")
    git(tmp_path / "clone", "config", "remote.origin.url", origin)
    assert run_cookiecutter(tmp_path / "clone", tmp_path).returncode == 0
    assert json.loads((tmp_path / "my-experiment/.cruft.json").read_text())["template"] == address


def test_a_commit_that_the_origin_does_not_have_is_found_in_the_clone_itself(released, run_cookiecutter, tmp_path):
    git(tmp_path, "clone", "-q", str(released), "clone")
    (tmp_path / "clone/README.md").write_text("mine\n")
    commit = commit_all(tmp_path / "clone", "not pushed")
    assert run_cookiecutter(tmp_path / "clone", tmp_path).returncode == 0
    record = json.loads((tmp_path / "my-experiment/.cruft.json").read_text())
    assert (record["template"], record["commit"]) == (str(tmp_path / "clone"), commit)


def test_where_no_commit_tells_what_was_rendered_none_is_recorded_and_that_is_said(
    template, released, run_cookiecutter, tmp_path
):
    git(tmp_path, "clone", "-q", str(released), "changed")
    (tmp_path / "changed/README.md").write_text("mine\n")
    for source, reason in (
        (template, "it is no git repository"),
        (tmp_path / "changed", "it has changes that are not"),
    ):
        output = tmp_path / f"from-{source.name}"
        done = run_cookiecutter(source, output)
        assert f"`cruft update` will not find the template: {reason}" in done.stdout
        assert not (output / "my-experiment/.cruft.json").exists()
