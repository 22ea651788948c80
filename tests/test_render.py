"""What comes out: the right files, nothing left of the template, the same from wherever it is rendered."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from conftest import SLUG, files_in, git, run_cruft
from options import CHOICES, all_pairs, pairs_in, pairwise
from packaging.requirements import Requirement

import batteries_answers
from batteries_answers import DEPENDENCIES, RESERVED, WINDOWS_DEVICES

VERBS = ["split", "preview", "check", "train", "report", "predict", "average", "blend", "submit", "scores"]
EXPERIMENT = ["__init__", "augmentations", "dataset", "model", "splits"]
BATTERIES = [
    "__init__",
    "averaging",
    "backends",
    "background",
    "batchnorm",
    "blends",
    "checkpoints",
    "checks",
    "cli",
    "console",
    "data",
    "data_checks",
    "devices",
    "distributed",
    "errors",
    "files",
    "folds",
    "handshake",
    "histories",
    "images",
    "interrupts",
    "knobs",
    "launch",
    "ledger",
    "lines",
    "logdirs",
    "machine_checks",
    "metrics",
    "mistakes",
    "model_checks",
    "parallel",
    "pages",
    "past_runs",
    "pixels",
    "plots",
    "predictions",
    "randomness",
    "ranks",
    "records",
    "reports",
    "resume",
    "runs",
    "schedules",
    "scoring",
    "sections",
    "sheets",
    "splits",
    "state",
    "steps",
    "stopping",
    "submissions",
    "summaries",
    "timing",
    "trackers",
    "views",
    "weights",
]
SCRIPTS = ["common", "train_ddp", "train_device", "train_dp", "train_folds", "train_slurm"]
TESTS = [
    "conftest",
    "loops",
    "models",
    "pictures",
    "processes",
    "small_data",
    "tables",
    "test_averaging",
    "test_background",
    "test_blend",
    "test_check",
    "test_checkpoints",
    "test_data",
    "test_folds",
    "test_parallel",
    "test_predict",
    "test_preview",
    "test_recipe",
    "test_record",
    "test_report",
    "test_resume",
    "test_road",
    "test_scores",
    "test_scripts",
    "test_splits",
    "test_starter",
    "test_structure",
    "test_submit",
    "test_tasks",
    "test_trackers",
    "test_train",
]
FILES = {
    *(".gitattributes", ".gitignore", ".pre-commit-config.yaml", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
    *("data/.gitkeep", "logs/.gitkeep", "splits/.gitkeep"),
    *(f"{name}.py" for name in VERBS),
    *(f"experiment/{name}.py" for name in EXPERIMENT),
    *(f"batteries/{name}.py" for name in BATTERIES),
    *(f"scripts/{name}.sh" for name in SCRIPTS),
    *(f"tests/{name}.py" for name in TESTS),
}

OF_IMAGE_FILES = ("small_runs", "test_dataset", "test_images")
# Files of one choice alone.
OWN_FILES = {
    "image_folder": {"experiment/images.py", *(f"tests/{name}.py" for name in OF_IMAGE_FILES)},
    "csv": {"experiment/images.py", *(f"tests/{name}.py" for name in OF_IMAGE_FILES)},
    "tensorboard": {"scripts/tensorboard.sh"},
    "tensorboardx": {"scripts/tensorboard.sh"},
    "github": {".github/workflows/ci.yml"},
    "gitlab": {".gitlab-ci.yml"},
}
# Words that only repositories of these answers may have.
WORDS = {
    r"scripts/tensorboard|\"tensorboard": {"tensorboard", "tensorboardx"},
    r"\"tensorboardX": {"tensorboardx"},
    r"\"wandb": {"wandb"},
    r"\"mlflow": {"mlflow"},
    r"\.github": {"github"},
    r"gitlab": {"gitlab"},
    r"samples\.csv": {"csv"},
    r"cats/1\.jpg": {"image_folder"},
}
TORCH_SOURCES = r"tool\.uv|download\.pytorch|pytorch\.org"


def test_the_combinations_hold_every_pair_of_answers():
    left = all_pairs(CHOICES)
    for answers in pairwise(CHOICES):
        assert answers.keys() == CHOICES.keys()
        left -= pairs_in(answers)
    assert not left
    assert len(all_pairs({"a": ["1", "2", "3"], "b": ["4", "5"], "c": ["6"]})) == 3 * 2 + 3 + 2


def test_each_choice_leaves_exactly_its_own_files(render, combination):
    expected = FILES.union(*(OWN_FILES.get(answer, set()) for answer in combination.values()))
    assert set(files_in(render(**combination))) == expected


def test_python_and_shell_equal_the_templates_byte_for_byte(render, template, combination):
    source = template / SLUG
    chosen = [source / ".variants" / question / answer for question, answer in combination.items()]
    chosen += [source / ".variants/data_set/image_folder"] * (combination["data_set"] == "csv")
    chosen += [source / ".variants/tracker/tensorboard"] * (combination["tracker"] == "tensorboardx") + [source]
    for name, content in files_in(render(**combination)).items():
        if name.endswith((".py", ".sh")):
            original = next(folder / name for folder in chosen if (folder / name).is_file())
            assert content == original.read_bytes(), name


def test_no_jinja_and_no_word_of_the_template_is_left(render, combination):
    for name, content in files_in(render(**combination)).items():
        text = content.decode()
        assert not re.search(r"cookiecutter\.|\{%|(?<!\$)\{\{ ", text), name
        assert not re.search(r"\n\n\n\n", text), f"{name} has a hole"
        assert text.endswith("\n") or not text, f"{name} ends without a new line"


def test_an_answer_that_was_not_given_leaves_no_word(render, combination):
    words = [word for word, answers in WORDS.items() if not answers & set(combination.values())]
    if combination["torch"] == "default":
        words.append(TORCH_SOURCES)
    folder = render(**combination)
    documents = [path for path in folder.rglob("*") if path.suffix in (".md", ".toml", ".yaml", ".yml")]
    for path in [*documents, folder / "Makefile", folder / ".gitignore"]:
        for word in words:
            found = re.search(word, path.read_text(encoding="utf-8"))
            assert not found, f"{path.name} says {found and found[0]}"


def test_configuration_files_parse_and_hold_the_answers(render, combination):
    folder = render(**combination)
    for path in [*folder.rglob("*.toml"), *folder.rglob("*.y*ml"), *folder.rglob("*.json")]:
        text = path.read_text(encoding="utf-8")
        parse = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix, yaml.safe_load)
        assert parse(text), path
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "my-experiment"
    tracker, license_name = combination["tracker"], combination["license"]
    assert project["tool"]["batteries"]["trackers"] == ([] if tracker == "none" else [tracker])
    assert project["project"]["license"] == (
        "LicenseRef-Proprietary" if license_name == "Proprietary" else license_name
    )


def test_the_name_of_no_dependency_can_be_the_projects(render, combination):
    project = tomllib.loads((render(**combination) / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {re.split(r"[<>=; ]", dependency)[0].lower() for dependency in wanted}
    assert names <= DEPENDENCIES
    assert (combination["tracker"] in names) == (combination["tracker"] != "none")


def test_the_name_of_what_a_dependency_needs_cannot_be_the_projects():
    found, left = set(), list(DEPENDENCIES)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):  # of another system
            wanted = [Requirement(text) for text in requires(name) or []]
            wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
            left += [re.sub(r"[-_.]+", "-", one.name).lower() for one in wanted]
    assert len(found) > 100
    assert {name for name in found if batteries_answers.SLUG.fullmatch(name)} <= RESERVED


def test_every_name_is_legal_on_windows_and_on_systems_that_do_not_tell_case(render, combination):
    names = list(files_in(render(**combination)))
    assert len({name.lower() for name in names}) == len(names)
    for part in {part for name in names for part in Path(name).parts}:
        assert not re.search(r'[<>:"|?*\\\x00-\x1f]|[. ]$', part), part
        assert part.lower().split(".")[0] not in WINDOWS_DEVICES, part


def test_what_the_readme_links_and_calls_is_there(render, combination):
    folder = render(**combination)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:scripts|tests)/\w+\.(?:sh|py)|(?<=python )\w+\.py", readme))
    assert {"scripts/train_device.sh", "split.py", "tests/test_data.py"} <= named
    for name in named | set(re.findall(r"\]\((?!http)([^)#]+)\)", readme)):
        assert (folder / name).exists(), name
    targets = set(re.findall(r"^([a-z-]+):", (folder / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b(?=`| *#)", readme)) <= targets


def test_the_formatter_changes_nothing_and_the_linter_finds_nothing(render):
    folders = [str(render(**answers)) for answers in pairwise(CHOICES)]
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", *folders], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("license_name", CHOICES["license"])
def test_the_license_is_the_chosen_one_and_names_its_owner(render, license_name):
    text = (render(license=license_name, author="Ada Lovelace") / "LICENSE").read_text(encoding="utf-8")
    assert "Ada Lovelace" in text
    beginning = {"MIT": "MIT License", "BSD-3-Clause": "BSD 3-Clause License", "Apache-2.0": "Apache License"}
    assert beginning.get(license_name, "All rights reserved") in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no run bits")
def test_scripts_can_be_run_and_what_they_share_cannot(render):
    for script in (render() / "scripts").iterdir():
        assert os.access(script, os.X_OK) == (script.name != "common.sh"), script


def test_path_git_clone_with_a_tag_zip_and_cruft_give_equal_trees(render, released, run_cookiecutter, tmp_path):
    git(released, "archive", "--prefix=batteries/", "-o", str(tmp_path / "batteries.zip"), "HEAD")
    sources: list[tuple[Path | str, ...]] = [
        (released,),
        (f"git+{released.as_uri()}", "--checkout", "v0.1.0"),
        (tmp_path / "batteries.zip",),
    ]
    for number, (source, *flags) in enumerate(sources):
        done = run_cookiecutter(source, tmp_path / str(number), *flags)
        assert done.returncode == 0, done.stderr
    run_cruft("create", released.as_uri(), "--output-dir", str(tmp_path / "cruft"), "-y", home=tmp_path / "home")

    wanted = files_in(render())
    for output in ("0", "1", "2", "cruft"):
        found = files_in(tmp_path / output / "my-experiment")
        assert found.pop(".cruft.json", None) is not None or output == "2"
        assert found == wanted
        assert os.access(tmp_path / output / "my-experiment/scripts/train_device.sh", os.X_OK)


def test_files_of_your_own_are_there_still_after_rendering_over_them(template, run_cookiecutter, tmp_path):
    assert run_cookiecutter(template, tmp_path).returncode == 0
    own = [tmp_path / "my-experiment" / folder / "own.py" for folder in ("batteries", "experiment", "scripts", "tests")]
    for path in own:
        path.write_text("mine = True\n")
    for flags in (["-f"], ["-f", "-s"]):
        assert run_cookiecutter(template, tmp_path, *flags).returncode == 0
        assert [path.read_text() for path in own] == ["mine = True\n"] * 4, flags


@pytest.fixture
def another_disk() -> Iterator[Path]:
    """A folder on a file system of its own, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of Unix")
def test_rendering_over_a_repository_passes_by_what_is_no_file_and_follows_links(
    template, run_cookiecutter, tmp_path, another_disk
):
    assert run_cookiecutter(template, tmp_path).returncode == 0
    folder = tmp_path / "my-experiment"
    (folder / "scripts/.#train_device.sh").symlink_to("nobody@nowhere.1:2")  # an editor's lock
    os.mkfifo(folder / "scripts/pipe.sh")
    shutil.move(folder / ".github", another_disk / "github")
    (folder / ".github").symlink_to(another_disk / "github")
    workflow = another_disk / "github/workflows/ci.yml"
    wanted = workflow.read_text()
    workflow.write_text("old")
    done = run_cookiecutter(template, tmp_path, "-f")
    assert done.returncode == 0, done.stderr
    assert workflow.read_text() == wanted
    assert not (folder / ".variants").exists()


@pytest.mark.skipif(os.name == "nt", reason="a shell tells where it is by PWD")
@pytest.mark.parametrize(("flags", "folder"), [("", "two-words"), ("-o out", "out/two-words")])
def test_the_next_steps_name_commands_that_are_there(template, tmp_path, flags, folder):
    command = f'"{sys.executable}" -m cookiecutter "{template}" --no-input {flags} project_name="Two words"'
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    run = ["bash", "-c", f'cd "{tmp_path}" && {command}']
    said = subprocess.run(run, env=environment, capture_output=True, text=True).stdout
    assert f"  cd {folder}\n" in said
    for script in re.findall(r"scripts/\w+\.sh", said):
        assert (tmp_path / folder / script).is_file()


def test_rendering_over_a_folder_that_is_there_is_refused_and_changes_nothing(template, run_cookiecutter, tmp_path):
    folder = tmp_path / "my-experiment"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    done = run_cookiecutter(template, tmp_path)
    assert done.returncode == 1
    assert files_in(tmp_path) == {"my-experiment/mine.txt": b"mine"}
