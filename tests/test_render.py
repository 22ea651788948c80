"""What comes out: the right files, nothing left of the template, the same from wherever it is rendered."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import SLUG, files_in

DATA_SETS = ["digits", "image_folder", "csv", "cifar10", "mnist"]
TRACKERS = ["tensorboard", "none"]
LICENSES = ["MIT", "BSD-3-Clause", "Apache-2.0", "Proprietary"]
PAIRS = [(data_set, tracker) for data_set in DATA_SETS for tracker in TRACKERS]

FILES = {
    *(".github/workflows/ci.yml", ".gitignore", ".pre-commit-config.yaml", "LICENSE", "Makefile", "README.md"),
    *("pyproject.toml", "data/.gitkeep", "logs/.gitkeep", "splits/.gitkeep", ".gitattributes"),
    *(f"{name}.py" for name in ("average", "blend", "check", "predict", "preview", "scores", "split", "submit", "train")),
    *(f"experiment/{name}.py" for name in ("__init__", "augmentations", "dataset", "model", "splits")),
    *(
        f"batteries/{name}.py"
        for name in (
            *("averaging", "blends", "images", "ledger", "past_runs", "predictions", "scoring", "submissions", "views"),
            *("__init__", "background", "batchnorm", "checkpoints", "cli", "console", "data", "devices", "distributed"),
            *("errors", "files", "folds", "interrupts", "knobs", "launch", "logdirs", "metrics", "parallel", "pixels"),
            *("randomness", "records", "resume", "runs", "schedules", "sheets", "splits", "state", "steps", "stopping"),
            *("timing", "trackers", "weights"),
            *("checks", "data_checks", "handshake", "machine_checks", "model_checks"),
        )
    ),
    *(f"scripts/{name}.sh" for name in ("common", "train_ddp", "train_device", "train_dp", "train_folds")),
    *(
        f"tests/{name}.py"
        for name in (
            *("tables", "test_averaging", "test_blend", "test_predict", "test_road", "test_scores", "test_submit"),
            *("conftest", "loops", "models", "pictures", "processes", "small_data", "test_background", "test_check"),
            *("test_checkpoints", "test_data", "test_folds", "test_parallel", "test_preview", "test_recipe"),
            *("test_resume", "test_scripts", "test_splits", "test_starter", "test_structure", "test_train"),
        )
    ),
}


# Files of one choice alone.
OWN_FILES = {
    "image_folder": {"experiment/images.py", "tests/test_dataset.py", "tests/test_images.py"},
    "csv": {"experiment/images.py", "tests/test_dataset.py", "tests/test_images.py"},
    "tensorboard": {"scripts/tensorboard.sh"},
}


@pytest.mark.parametrize(("data_set", "tracker"), PAIRS)
def test_each_choice_leaves_exactly_its_own_files(render, data_set, tracker):
    expected = FILES | OWN_FILES.get(data_set, set()) | OWN_FILES.get(tracker, set())
    assert set(files_in(render(data_set=data_set, tracker=tracker))) == expected


@pytest.mark.parametrize(("data_set", "tracker"), PAIRS)
def test_python_and_shell_equal_the_templates_byte_for_byte(render, template, data_set, tracker):
    source = template / SLUG
    chosen = [source / ".variants/data_set" / data_set, source / ".variants/tracker" / tracker]
    chosen += [source / ".variants/data_set/image_folder"] * (data_set == "csv") + [source]
    for name, content in files_in(render(data_set=data_set, tracker=tracker)).items():
        if name.endswith((".py", ".sh")):
            original = next(folder / name for folder in chosen if (folder / name).is_file())
            assert content == original.read_bytes(), name


@pytest.mark.parametrize("license_name", LICENSES)
@pytest.mark.parametrize(("data_set", "tracker"), PAIRS)
def test_no_jinja_and_no_word_of_the_template_is_left(render, data_set, tracker, license_name):
    for name, content in files_in(render(data_set=data_set, tracker=tracker, license=license_name)).items():
        text = content.decode()
        assert not re.search(r"cookiecutter|\{%|\{\{ ", text), name
        assert not re.search(r"\n\n\n\n", text), f"{name} has a hole"
        assert text.endswith("\n") or not text, f"{name} ends without a new line"


@pytest.mark.parametrize("license_name", LICENSES)
def test_the_license_is_the_chosen_one_and_names_its_owner(render, license_name):
    folder = render(license=license_name, author="Ada Lovelace")
    assert "Copyright (c) Ada Lovelace" in (folder / "LICENSE").read_text() or license_name == "Apache-2.0"
    assert "Ada Lovelace" in (folder / "LICENSE").read_text()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["license"] == ("LicenseRef-Proprietary" if license_name == "Proprietary" else license_name)


@pytest.mark.parametrize(("data_set", "tracker"), PAIRS)
def test_configuration_files_parse_and_hold_the_answers(render, data_set, tracker):
    folder = render(data_set=data_set, tracker=tracker)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-experiment"
    assert project["tool"]["batteries"]["trackers"] == (["tensorboard"] if tracker == "tensorboard" else [])
    names = {re.split(r"[<>=]", dependency)[0] for dependency in project["project"]["dependencies"]}
    assert ("tensorboard" in names) == (tracker == "tensorboard")
    for name in (".pre-commit-config.yaml", ".github/workflows/ci.yml"):
        assert yaml.safe_load((folder / name).read_text())
    if tracker == "none":
        readme = (folder / "README.md").read_text()
        assert "tensorboard" not in readme.lower()


def test_scripts_can_be_run_and_what_they_share_cannot(render):
    for script in (render() / "scripts").iterdir():
        assert os.access(script, os.X_OK) == (script.name != "common.sh"), script


def test_path_git_clone_and_zip_give_equal_trees(render, template, run_cookiecutter, tmp_path):
    repository = tmp_path / "batteries"
    subprocess.run(["git", "clone", "-q", make_repository(template, tmp_path / "origin"), repository], check=True)
    archive = tmp_path / "batteries.zip"
    subprocess.run(["git", "-C", repository, "archive", "--prefix=batteries/", "-o", archive, "HEAD"], check=True)
    wanted = files_in(render())
    for number, source in enumerate((f"file://{repository}", archive)):
        output = tmp_path / f"out{number}"
        done = run_cookiecutter(source, output)
        assert done.returncode == 0, done.stderr
        assert files_in(output / "my-experiment") == wanted
        assert os.access(output / "my-experiment/scripts/train_device.sh", os.X_OK)


def make_repository(template: Path, folder: Path) -> Path:
    """The template as a git repository with one commit."""
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-C", str(folder)]
    folder.mkdir()
    for name, content in files_in(template).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / name).chmod((template / name).stat().st_mode)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "template"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_the_next_steps_name_commands_that_are_there(template, run_cookiecutter, tmp_path):
    said = run_cookiecutter(template, tmp_path, project_name="Two words").stdout
    assert "cd two-words" in said
    for script in re.findall(r"scripts/\w+\.sh", said):
        assert (tmp_path / "two-words" / script).is_file()


def test_rendering_over_a_folder_that_is_there_is_refused_and_changes_nothing(template, run_cookiecutter, tmp_path):
    folder = tmp_path / "my-experiment"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    done = run_cookiecutter(template, tmp_path)
    assert done.returncode == 1
    assert files_in(tmp_path) == {"my-experiment/mine.txt": b"mine"}
