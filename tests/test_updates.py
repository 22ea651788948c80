"""A generated repository records its template; `cruft` updates the toolkit and does not change user-owned files."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import SLUG, commit_all, files_in, git, run_cruft

ANSWERS = {"data_set": "csv", "tracker": "none", "ci": "gitlab", "author": 'Åsa "Ö" O\'Neill'}
# Lines that the last release had differently: the beginning of the present line, and the line of the release.
OLDER = {
    "batteries/core/errors.py": ("class UserError", "class UserError(Exception):  # of the last release"),
    "scripts/common.sh": ("set -euo", "set -eu  # of the last release"),
    "README.md": ("## Repository layout", "## Repository layout of the last release"),
    "train.py": ("def main(", "def main(config: Config) -> float:  # of the last release"),
    ".variants/data_set/image_folder/experiment/model.py": (
        "def build_model",
        "def build_model(num_classes):  # of the last release",
    ),
}
# Edits of a user in train.py, far from the lines that the update changes.
OPTIONS = {
    "batch_size: Count = 32": "batch_size: Count = 48",
    "clip_norm: Positive | None = None": "clip_norm: Positive | None = 1.0",
    'optimizer: Literal["adamw", "sgd"] = "adamw"': 'optimizer: Literal["adamw", "sgd"] = "sgd"',
}


def change_line(path: Path, beginning: str, line: str) -> None:
    """Replace the one line that begins with `beginning`."""
    text, times = re.subn(rf"^{re.escape(beginning)}.*$", lambda _: line, path.read_text(encoding="utf-8"), flags=re.M)
    assert times == 1, f"{times} lines begin with {beginning} in {path}"
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def history(template, tmp_path_factory) -> Path:
    """The template as a git repository: a release v0.1.0, followed by the present state."""
    folder = tmp_path_factory.mktemp("history") / "batteries"
    shutil.copytree(template, folder)
    git(folder, "init", "-q", "-b", "main")
    for name, (beginning, line) in OLDER.items():
        change_line(folder / SLUG / name, beginning, line)
    removed = folder / SLUG / "batteries/core/removed.py"
    removed.write_text('"""A module that was removed after the release."""\n')
    added = f"{SLUG}/batteries/run/timing.py"
    (folder / added).unlink()
    commit_all(folder, "release")
    git(folder, "tag", "v0.1.0")
    for name in [*(f"{SLUG}/{name}" for name in OLDER), added]:
        shutil.copy2(template / name, folder / name)
    removed.unlink()
    commit_all(folder, "present")
    return folder


@pytest.fixture
def project(history, run_cookiecutter, tmp_path) -> Path:
    """A repository that was generated from the last release and committed."""
    done = run_cookiecutter(f"git+file://{history}", tmp_path, "--checkout", "v0.1.0", **ANSWERS)
    assert done.returncode == 0, done.stderr
    git(tmp_path / "my-experiment", "init", "-q")
    commit_all(tmp_path / "my-experiment", "generated")
    return tmp_path / "my-experiment"


def edit(folder: Path) -> None:
    """Edit a repository as a user does."""
    for option, changed in OPTIONS.items():
        text = (folder / "train.py").read_text(encoding="utf-8")
        assert text.count(option) == 1, option
        (folder / "train.py").write_text(text.replace(option, changed), encoding="utf-8")
    (folder / "experiment/model.py").write_text("def build_model(num_classes): return mine(num_classes)\n")
    (folder / "experiment/mine.py").write_text("def mine(num_classes): ...\n")
    (folder / "notes.md").write_text("My notes.\n")
    (folder / "scripts/train_dp.sh").unlink()


def update(project: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_cruft("update", "--skip-apply-ask", *flags, home=project.parent, folder=project)


def test_an_update_of_an_edited_repository_keeps_the_edits(project, render):
    edit(project)
    commit_all(project, "mine")
    done = update(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not git(project, "diff", "--name-only", "--diff-filter=U")

    # The same edits in a new repository of the present state.
    oracle = project.parent / "oracle"
    shutil.copytree(render(**ANSWERS), oracle)
    edit(oracle)
    found = files_in(project)
    assert json.loads(found.pop(".cruft.json"))["commit"]
    assert found == files_in(oracle)


def test_only_lines_that_both_sides_changed_are_in_conflict(project, render):
    edit(project)
    change_line(project / "train.py", "def main(", "def main(config: Config) -> float:  # mine")
    commit_all(project, "mine")
    update(project)
    assert git(project, "diff", "--name-only", "--diff-filter=U").split() == ["train.py"]

    text = (project / "train.py").read_text(encoding="utf-8")
    edited = "def main(config: Config) -> float:  # mine\n"
    updated = "def main(config: Config) -> float:\n"
    conflicts = re.findall(r"^<<<<<<<.*\n((?:.*\n)*?)=======\n((?:.*\n)*?)>>>>>>>.*\n", text, re.MULTILINE)
    assert conflicts == [(edited, updated)]
    oracle = project.parent / "oracle"
    shutil.copytree(render(**ANSWERS), oracle)
    edit(oracle)
    merged = re.sub(r"^<<<<<<<.*\n(?:.*\n)*?=======\n((?:.*\n)*?)>>>>>>>.*\n", r"\1", text, flags=re.MULTILINE)
    assert merged == (oracle / "train.py").read_text(encoding="utf-8")
    found, expected = files_in(project), files_in(oracle)
    del found["train.py"], found[".cruft.json"], expected["train.py"]
    assert found == expected


def test_cruft_check_reports_whether_there_is_an_update(project, history):
    old = run_cruft("check", home=project.parent, folder=project)
    assert (old.returncode, "out of date" in old.stdout) == (1, True)
    assert update(project).returncode == 0
    commit_all(project, "updated")
    new = run_cruft("check", home=project.parent, folder=project)
    assert (new.returncode, "up to date" in new.stdout) == (0, True)
    record = json.loads((project / ".cruft.json").read_text(encoding="utf-8"))
    assert record["commit"] == git(history, "rev-parse", "HEAD").strip()


def test_the_record_equals_the_one_that_cruft_writes(released, run_cookiecutter, tmp_path):
    source = f"file://{released}"
    assert run_cookiecutter(f"git+{source}", tmp_path, "--checkout", "v0.1.0", **ANSWERS).returncode == 0
    recorded = json.loads((tmp_path / "my-experiment/.cruft.json").read_text(encoding="utf-8"))
    extra = ["--extra-context", json.dumps(ANSWERS), "--checkout", "v0.1.0", "--output-dir", str(tmp_path / "cruft")]
    assert run_cruft("create", source, "-y", *extra, home=tmp_path).returncode == 0
    by_cruft = json.loads((tmp_path / "cruft/my-experiment/.cruft.json").read_text(encoding="utf-8"))
    assert recorded["template"] == source
    for record in (recorded, by_cruft):  # cruft turns file:// into a path, and keeps private variables
        record["template"] = str(released)
        answers = record["context"].pop("cookiecutter")
        record["answers"] = {name: answer for name, answer in answers.items() if not name.startswith("_")}
        assert answers["_commit"] == record["commit"] == git(released, "rev-parse", "HEAD").strip()
    assert recorded == by_cruft


def test_the_record_of_a_template_in_a_subdirectory_equals_that_of_cruft(template, run_cookiecutter, tmp_path):
    repository = tmp_path / "templates"
    shutil.copytree(template, repository / "vision/batteries")
    git(repository, "init", "-q", "-b", "main")
    commit = commit_all(repository, "templates")
    directory = ["--directory", "vision/batteries"]
    flags = [*directory, "--output-dir", str(tmp_path / "cruft")]
    done = run_cruft("create", str(repository), "-y", *flags, home=tmp_path)
    assert done.returncode == 0, done.stderr
    by_cruft = json.loads((tmp_path / "cruft/my-experiment/.cruft.json").read_text(encoding="utf-8"))
    (repository / "notes.md").write_text("Changes outside the template do not matter.\n")
    sources = {
        "git": (f"git+file://{repository}", *directory),
        "path": (repository, *directory),
        "subdirectory": (repository / "vision/batteries",),
    }
    for name, (source, *flags) in sources.items():
        done = run_cookiecutter(source, tmp_path / name, *flags)
        assert "cannot find the template" not in done.stdout
        record = json.loads((tmp_path / name / "my-experiment/.cruft.json").read_text(encoding="utf-8"))
        assert record["template"].removeprefix("file://") == by_cruft["template"] == str(repository)
        for key in ("commit", "checkout", "directory"):
            assert record[key] == by_cruft[key], key
        assert record["commit"] == commit
    project = tmp_path / "git/my-experiment"
    git(project, "init", "-q")
    commit_all(project, "generated")
    done = run_cruft("check", home=tmp_path, folder=project)
    assert done.returncode == 0, done.stdout


def test_an_unrelated_repository_around_the_template_is_not_recorded(template, run_cookiecutter, tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("/batteries\n/out\n")
    commit_all(tmp_path, "unrelated")
    shutil.copytree(template, tmp_path / "batteries")
    done = run_cookiecutter(tmp_path / "batteries", tmp_path / "out")
    assert "`cruft update` cannot find the template: it is not a git repository" in done.stdout
    assert not (tmp_path / "out/my-experiment/.cruft.json").exists()


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://ada:secret@example.org/ada/batteries.git", "https://example.org/ada/batteries.git"),
        ("git@example.org:ada/batteries.git", "git@example.org:ada/batteries.git"),
        ("ssh://git@example.org/ada/batteries", "ssh://git@example.org/ada/batteries"),
    ],
)
def test_the_record_has_the_origin_of_a_clone_without_the_password(
    released, run_cookiecutter, tmp_path, origin, address
):
    git(tmp_path, "clone", "-q", str(released), "clone")
    git(tmp_path / "clone", "config", "remote.origin.url", origin)
    assert run_cookiecutter(tmp_path / "clone", tmp_path).returncode == 0
    assert json.loads((tmp_path / "my-experiment/.cruft.json").read_text())["template"] == address


def test_a_commit_that_was_not_pushed_is_recorded_with_the_clone(released, run_cookiecutter, tmp_path):
    git(tmp_path, "clone", "-q", str(released), "clone")
    (tmp_path / "clone/README.md").write_text("mine\n")
    commit = commit_all(tmp_path / "clone", "not pushed")
    assert run_cookiecutter(tmp_path / "clone", tmp_path).returncode == 0
    record = json.loads((tmp_path / "my-experiment/.cruft.json").read_text())
    assert (record["template"], record["commit"]) == (str(tmp_path / "clone"), commit)


def test_without_a_commit_nothing_is_recorded_and_a_message_is_printed(template, released, run_cookiecutter, tmp_path):
    git(tmp_path, "clone", "-q", str(released), "changed")
    (tmp_path / "changed/README.md").write_text("mine\n")
    for source, reason in (
        (template, "it is not a git repository"),
        (tmp_path / "changed", "it has uncommitted changes"),
    ):
        output = tmp_path / f"from-{source.name}"
        done = run_cookiecutter(source, output)
        assert f"`cruft update` cannot find the template: {reason}" in done.stdout
        assert not (output / "my-experiment/.cruft.json").exists()


def test_the_rest_of_the_toolkit_is_added_by_an_update(released, render, run_cookiecutter, tmp_path):
    answers = ANSWERS | {"toolkit": "training"}
    done = run_cookiecutter(f"git+file://{released}", tmp_path, **answers)
    assert done.returncode == 0, done.stderr
    project = tmp_path / "my-experiment"
    git(project, "init", "-q")
    edit(project)
    commit_all(project, "mine")
    assert not (project / "batteries/report").exists()
    done = update(project, "--variables-to-update", '{"toolkit": "full"}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert not git(project, "diff", "--name-only", "--diff-filter=U")

    # The same edits in a new repository with the complete toolkit.
    oracle = shutil.copytree(render(**ANSWERS), tmp_path / "oracle")
    edit(oracle)
    found = files_in(project)
    record = json.loads(found.pop(".cruft.json"))
    assert record["context"]["cookiecutter"]["toolkit"] == "full"
    assert found == files_in(oracle)
    assert (project / "batteries/report/html.py").is_file()
