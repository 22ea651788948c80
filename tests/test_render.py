"""A generated repository has the files of its answers and no trace of the template, from any kind of source."""

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
from options import CHOICES, all_pairs, left_out_by_training, pairs_in, pairwise
from packaging.requirements import Requirement

import batteries_answers
from batteries_answers import DEPENDENCIES, RESERVED, WINDOWS_DEVICES

IMAGE_FILES = {
    "experiment/images.py",
    "tests/small_runs.py",
    "tests/test_dataset.py",
    "tests/test_images.py",
    "tests/test_packs.py",
}
# Files that only repositories with this answer have.
OWN_FILES = {
    "image_folder": IMAGE_FILES,
    "csv": IMAGE_FILES | {"experiment/table.py"},
    "tensorboard": {"scripts/tensorboard.sh"},
    "tensorboardx": {"scripts/tensorboard.sh"},
    "segmentation": {"tests/test_model.py"},
    "github": {".github/workflows/ci.yml"},
    "gitlab": {".gitlab-ci.yml"},
}
# Patterns that only repositories with one of these answers may contain.
WORDS = {
    r"scripts/tensorboard|\"tensorboard": {"tensorboard", "tensorboardx"},
    r"\"tensorboardX": {"tensorboardx"},
    r"\"wandb": {"wandb"},
    r"\"mlflow": {"mlflow"},
    r"\.github": {"github"},
    r"gitlab": {"gitlab"},
    r"samples\.csv": {"csv"},
    r"cats/1\.jpg": {"image_folder"},
    r"tools/(report|check|blend|submit|scores)\b": {"full"},
}
TORCH_SOURCES = r"tool\.uv|download\.pytorch|pytorch\.org"


def test_the_combinations_contain_every_pair_of_answers():
    left = all_pairs(CHOICES)
    for answers in pairwise(CHOICES):
        assert answers.keys() == CHOICES.keys()
        left -= pairs_in(answers)
    assert not left
    assert len(all_pairs({"a": ["1", "2", "3"], "b": ["4", "5"], "c": ["6"]})) == 3 * 2 + 3 + 2


def test_each_choice_has_exactly_its_own_files(render, template, combination):
    common = {name for name in files_in(template / SLUG) if not name.startswith(".variants/")}
    assert {"README.md", "pyproject.toml", "train.py", "batteries/run/run.py", "tests/test_data.py"} <= common
    expected = common.union({"LICENSE"}, *(OWN_FILES.get(answer, set()) for answer in combination.values()))
    if combination["toolkit"] == "training":
        expected -= left_out_by_training()
    assert set(files_in(render(**combination))) == expected


def test_python_and_shell_files_are_copied_byte_for_byte(render, template, combination):
    source = template / SLUG
    pair = f"{combination['data_set']}-{combination['task']}"
    chosen = [source / ".variants/combination" / name for name in (pair, f"image_folder-{combination['task']}")]
    chosen = chosen[: 1 + (combination["data_set"] == "csv")]
    chosen.append(source / ".variants/task" / combination["task"])
    chosen += [source / ".variants" / question / answer for question, answer in combination.items()]
    chosen += [source / ".variants/data_set/image_folder"] * (combination["data_set"] == "csv")
    chosen += [source / ".variants/tracker/tensorboard"] * (combination["tracker"] == "tensorboardx") + [source]
    for name, content in files_in(render(**combination)).items():
        if name.endswith((".py", ".sh")):
            original = next(folder / name for folder in chosen if (folder / name).is_file())
            assert content == original.read_bytes(), name


def test_no_jinja_markup_is_left(render, combination):
    for name, content in files_in(render(**combination)).items():
        text = content.decode()
        assert not re.search(r"cookiecutter\.|\{%|(?<!\$)\{\{ ", text), name
        assert not re.search(r"\n\n\n\n", text), f"{name} has more than two empty lines"
        assert text.endswith("\n") or not text, f"{name} ends without a newline"


def test_documents_mention_only_the_chosen_answers(render, combination):
    words = [word for word, answers in WORDS.items() if not answers & set(combination.values())]
    if combination["torch"] == "default":
        words.append(TORCH_SOURCES)
    folder = render(**combination)
    documents = [path for path in folder.rglob("*") if path.suffix in (".md", ".toml", ".yaml", ".yml")]
    for path in [*documents, folder / "Makefile", folder / ".gitignore"]:
        for word in words:
            found = re.search(word, path.read_text(encoding="utf-8"))
            assert not found, f"{path.name} mentions {found and found[0]}"


def test_configuration_files_parse_and_contain_the_answers(render, combination):
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


def test_the_environment_of_the_template_has_the_lower_bounds_of_generated_repositories(render, combination):
    root = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    generated = tomllib.loads((render(**combination) / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = generated.get("optional-dependencies", {}).get("sweep", [])
    wanted = {dependency for dependency in generated["dependencies"] + optional if "triton-rocm" not in dependency}
    assert wanted <= set(root["dependency-groups"]["rendered"])
    assert generated["requires-python"] == root["project"]["requires-python"]


def test_the_workflow_tests_every_python_version_and_the_oldest_dependencies(render):
    root = Path(__file__).parent.parent
    for folder in (root, render(ci="github")):
        jobs = yaml.safe_load((folder / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
        assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
        assert jobs["test"]["env"]["UV_PYTHON"] == "${{ matrix.python }}"
        oldest = yaml.safe_dump(jobs["oldest"])
        for text in ("UV_RESOLUTION: lowest-direct", "UV_PYTHON: '3.11'", "uv sync", "make test-fast"):
            assert text in oldest, text


def test_every_direct_dependency_is_a_reserved_name(render, combination):
    project = tomllib.loads((render(**combination) / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    wanted += project["build-system"]["requires"]
    wanted += project["project"].get("optional-dependencies", {}).get("sweep", [])
    names = {re.split(r"[<>=; ]", dependency)[0].lower() for dependency in wanted}
    assert names <= DEPENDENCIES
    assert (combination["tracker"] in names) == (combination["tracker"] != "none")


def test_every_indirect_dependency_is_a_reserved_name():
    found, left = set(), list(DEPENDENCIES)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):  # it is for another system
            wanted = [Requirement(text) for text in requires(name) or []]
            wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
            left += [re.sub(r"[-_.]+", "-", one.name).lower() for one in wanted]
    assert len(found) > 100
    assert {name for name in found if batteries_answers.SLUG.fullmatch(name)} <= RESERVED


def test_file_names_are_valid_on_windows_and_case_insensitive_systems(render, combination):
    names = list(files_in(render(**combination)))
    assert len({name.lower() for name in names}) == len(names)
    for part in {part for name in names for part in Path(name).parts}:
        assert not re.search(r'[<>:"|?*\\\x00-\x1f]|[. ]$', part), part
        assert part.lower().split(".")[0] not in WINDOWS_DEVICES, part


def test_paths_links_and_make_targets_in_documents_exist(render, combination):
    folder = render(**combination)
    targets = set(re.findall(r"^([a-z-]+):", (folder / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for document in folder.rglob("*.md"):
        text = document.read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:scripts|tests|tools|docs)/\w+\.(?:sh|py|md)|(?<=python )\w+\.py", text))
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
        assert set(re.findall(r"\bmake ([a-z-]+)\b(?=`| *#)", text)) <= targets, document.name
    assert {"scripts/train_device.sh", "tools/split.py", "tests/test_data.py"} <= named
    for name in named:
        assert (folder / name).exists(), name


def test_generated_code_is_formatted_and_lints_clean(render):
    folders = [str(render(**answers)) for answers in pairwise(CHOICES)]
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", *folders], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("license_name", CHOICES["license"])
def test_the_license_is_the_chosen_one_and_names_the_author(render, license_name):
    text = (render(license=license_name, author="Ada Lovelace") / "LICENSE").read_text(encoding="utf-8")
    assert "Ada Lovelace" in text
    beginning = {"MIT": "MIT License", "BSD-3-Clause": "BSD 3-Clause License", "Apache-2.0": "Apache License"}
    assert beginning.get(license_name, "All rights reserved") in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no executable bits")
def test_all_scripts_are_executable_except_common_sh(render):
    for script in (render() / "scripts").iterdir():
        assert os.access(script, os.X_OK) == (script.name != "common.sh"), script


def test_path_git_tag_zip_and_cruft_generate_equal_repositories(render, released, run_cookiecutter, tmp_path):
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


def test_generating_over_a_repository_keeps_additional_files(template, run_cookiecutter, tmp_path):
    assert run_cookiecutter(template, tmp_path).returncode == 0
    own = [tmp_path / "my-experiment" / folder / "own.py" for folder in ("batteries", "experiment", "scripts", "tests")]
    for path in own:
        path.write_text("mine = True\n")
    for flags in (["-f"], ["-f", "-s"]):
        assert run_cookiecutter(template, tmp_path, *flags).returncode == 0
        assert [path.read_text() for path in own] == ["mine = True\n"] * 4, flags


@pytest.fixture
def another_disk() -> Iterator[Path]:
    """A directory on another file system, if there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of Unix")
def test_generating_over_a_repository_skips_special_files_and_follows_links(
    template, run_cookiecutter, tmp_path, another_disk
):
    assert run_cookiecutter(template, tmp_path).returncode == 0
    folder = tmp_path / "my-experiment"
    (folder / "scripts/.#train_device.sh").symlink_to("nobody@nowhere.1:2")  # the lock file of an editor
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


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that sets PWD")
@pytest.mark.parametrize(("flags", "folder"), [("", "two-words"), ("-o out", "out/two-words")])
def test_the_printed_next_steps_name_existing_commands(template, tmp_path, flags, folder):
    command = f'"{sys.executable}" -m cookiecutter "{template}" --no-input {flags} project_name="Two words"'
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    run = ["bash", "-c", f'cd "{tmp_path}" && {command}']
    printed = subprocess.run(run, env=environment, capture_output=True, text=True).stdout
    assert f"  cd {folder}\n" in printed
    for script in re.findall(r"scripts/\w+\.sh", printed):
        assert (tmp_path / folder / script).is_file()


def test_an_existing_directory_is_rejected_and_not_changed(template, run_cookiecutter, tmp_path):
    folder = tmp_path / "my-experiment"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    done = run_cookiecutter(template, tmp_path)
    assert done.returncode == 1
    assert files_in(tmp_path) == {"my-experiment/mine.txt": b"mine"}
