"""Invalid answers are rejected with one line and nothing on disk; unusual ones give a valid repository."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import cookiecutter
import pytest
from click.testing import CliRunner
from cookiecutter.cli import main
from options import CHOICES, QUESTIONS

from cookiecutter_2_2_or_newer_is_needed import NEEDED

LONG = "x" * 61


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"project_slug": "../x"}, "project_slug '../x' is not a valid directory name"),
        ({"project_slug": "/tmp/x"}, "project_slug '/tmp/x' is not a valid directory name"),
        ({"project_slug": "a/b"}, "is not a valid directory name"),
        ({"project_slug": "My Experiment"}, "is not a valid directory name"),
        ({"project_slug": "-rf"}, "is not a valid directory name"),
        ({"project_slug": "1st"}, "is not a valid directory name"),
        ({"project_slug": "größe"}, "is not a valid directory name"),
        ({"project_slug": "a--b"}, "is not a valid directory name"),
        ({"project_slug": LONG}, f"project_slug '{LONG}' has 61 characters; use at most 60."),
        ({"project_slug": "con"}, "project_slug 'con' is a reserved name; use another, such as con-experiment."),
        ({"project_slug": "lpt1"}, "is a reserved name"),
        ({"project_slug": "class"}, "is a reserved name"),
        ({"project_slug": "torch"}, "is a reserved name"),
        ({"project_slug": "scikit_learn"}, "is a reserved name; use another, such as scikit_learn-experiment."),
        ({"project_slug": "packaging"}, "is a reserved name"),
        ({"project_slug": "node_modules"}, "is a reserved name"),
        ({"project_name": " "}, "project_name is empty; enter some text."),
        ({"project_name": "🙂"}, "project_slug '' is not a valid directory name"),
        ({"project_name": "x" * 201}, "project_name has 201 characters; use at most 200."),
        ({"description": "a\nb"}, "description 'a\\nb' has a line break or control character"),
        ({"author": "{% raw %}"}, "the answer '{% raw %}' has template markup such as {{ or {%"),
        ({"author": "\x7f"}, "has a line break or control character"),
        ({"description": "{{ 7 * 7 }}"}, "the answer '{{ 7 * 7 }}' has template markup such as {{ or {%"),
        ({"description": "{{"}, "the answer '{{' has template markup"),
        ({"author": "{{ 1 / 0 }}"}, "has template markup"),
        ({"project_name": "{{ cookiecutter.nothing }}"}, "has template markup"),
        ({"project_slug": "# {% include 'x' %}"}, "has template markup"),
        (
            {"task": "multilabel", "data_set": "image_folder"},
            "data_set image_folder has no targets for task multilabel; use data_set digits or csv, or task "
            "classification or segmentation.",
        ),
        ({"task": "regression", "data_set": "mnist"}, "use data_set digits or csv, or task classification."),
        ({"task": "segmentation", "data_set": "cifar10"}, "use data_set digits or image_folder or csv, or task"),
    ],
)
def test_invalid_answers_are_rejected_in_one_line_without_side_effects(template, tmp_path, answers, message):
    output = tmp_path / "out"
    output.mkdir()
    # In this process: separate processes would take ten seconds more, only for imports.
    extra = [f"{name}={text}" for name, text in answers.items()]
    home = {"HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    done = CliRunner(env=home).invoke(main, [str(template), "--no-input", "-o", str(output), *extra])
    assert done.exit_code == 1
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not list(output.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("value", ["", "true"])
def test_an_answer_in_a_config_file_that_is_not_a_string_is_rejected(template, run_cookiecutter, tmp_path, value):
    config = tmp_path / "config.yaml"
    config.write_text(f"default_context:\n  author: {value}\n")
    done = run_cookiecutter(template, tmp_path, "--config-file", str(config))
    assert done.returncode == 1
    assert "is not a string; put it in quotes." in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("source", ["--config-file", "COOKIECUTTER_CONFIG"])
@pytest.mark.parametrize(
    ("question", "value"),
    [("data_set", "imagenet"), ("license", "mit"), ("torch", "13"), ("tracker", "~"), ("toolkit", "[tiny]")],
)
def test_an_unknown_choice_in_a_config_file_is_rejected(
    template, run_cookiecutter, tmp_path, monkeypatch, source, question, value
):
    config = tmp_path / "config.yaml"
    config.write_text(f"default_context:\n  {question}: {value}\n  author: Ada\n")
    flags = [source, str(config)] if source.startswith("-") else []
    if not flags:
        monkeypatch.setenv(source, str(config))
    done = run_cookiecutter(template, tmp_path, *flags)
    error_line = done.stderr.strip().splitlines()[-1]  # after the warning of cookiecutter
    assert done.returncode == 1
    assert error_line.startswith(f"Error: {question} ")
    assert f" in {config} is not one of {', '.join(CHOICES[question])}; correct the file, or" in error_line
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    done = run_cookiecutter(template, tmp_path, *flags, "--default-config")
    assert done.returncode == 0, done.stderr


def test_choices_in_a_config_file_are_used(template, run_cookiecutter, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("default_context:\n  data_set: [csv]\n  ci: none\n  full_name: Ada\n  author: Ada\n")
    done = run_cookiecutter(template, tmp_path, "--config-file", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Copyright (c) Ada\n" in (tmp_path / "my-experiment/LICENSE").read_text().replace("2026 ", "")
    assert not (tmp_path / "my-experiment/.github").exists()


@pytest.mark.parametrize(("data_set", "mentioned"), [("image_folder", True), ("csv", True), ("digits", False)])
def test_the_next_steps_mention_the_augmentation_of_photographs(
    template, run_cookiecutter, tmp_path, data_set, mentioned
):
    done = run_cookiecutter(template, tmp_path, data_set=data_set)
    line = "Training mirrors images, and crops them to a quarter of their area or more."
    assert (done.returncode, line in done.stdout) == (0, mentioned), done.stderr


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("1.7.3", False), ("2.0.0", False), ("2.1.1", False), ("2.2.0", True), ("2.10.0", True), ("3.0.0.dev0", True)],
)
def test_a_cookiecutter_that_is_too_old_is_rejected_in_one_line(template, tmp_path, monkeypatch, version, accepted):
    monkeypatch.setattr(cookiecutter, "__version__", version)
    output = tmp_path / "out"
    home = {"HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    done = CliRunner(env=home).invoke(main, [str(template), "--no-input", "-o", str(output)])
    assert done.exit_code == (0 if accepted else 1), done.output
    assert output.exists() == accepted
    if not accepted:
        wanted = "is too old; use 2.2 or newer: pip install -U 'cookiecutter>=2.2'\n"
        assert done.output == f"Error: cookiecutter {version} {wanted}"


def test_cookiecutter_1_names_the_needed_version_in_its_import_error():
    # It prints the name of the first extension, as it cannot import modules of a template.
    major, minor = NEEDED
    assert QUESTIONS["_extensions"][0] == f"cookiecutter_{major}_{minor}_or_newer_is_needed.VersionCheck"


@pytest.mark.parametrize(
    "answers", [{"license": "GPL"}, {"data_set": "imagenet"}, {"tracker": "paper"}, {"toolkit": "tiny"}]
)
def test_an_unknown_choice_is_rejected_by_cookiecutter(template, run_cookiecutter, tmp_path, answers):
    # cookiecutter 2.7 prints a traceback, before anything of the template runs.
    done = run_cookiecutter(template, tmp_path, **answers)
    assert done.returncode == 1
    assert "but the choices are [" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "with \"double\" and 'single' quotes",
        "back\\slash \\n and \\",
        'ends in a quote "',
        '"""',
        "emoji 🙂 and accents: Ünïcödé, 日本語",
        "<b>html & more</b>",
        "$HOME `whoami` #hash",
        "x" * 200,
    ],
)
def test_unusual_descriptions_and_authors_are_kept_unchanged(template, run_cookiecutter, tmp_path, text):
    done = run_cookiecutter(template, tmp_path, description=text, author=text)
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((tmp_path / "my-experiment/pyproject.toml").read_text())["project"]
    assert project["description"] == text
    assert project["authors"] == [{"name": text}]
    assert text in (tmp_path / "my-experiment/README.md").read_text()
    assert text in (tmp_path / "my-experiment/LICENSE").read_text()


def test_a_terminal_that_cannot_encode_the_name_is_not_an_error(template, run_cookiecutter, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_cookiecutter(template, tmp_path, project_name="Leaf spots 🙂")
    assert (done.returncode, "Leaf spots ? is ready." in done.stdout) == (0, True), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a Unix shell")
@pytest.mark.parametrize("outlet", [">&-", "| true", ">/dev/full"])
def test_a_closed_or_full_output_is_not_an_error(template, tmp_path, outlet):
    command = f'"{sys.executable}" -m cookiecutter "{template}" --no-input -o "{tmp_path}" {outlet}'
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (tmp_path / "my-experiment/LICENSE").is_file()
    assert not (tmp_path / "my-experiment/.variants").exists()


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Fish & chips!", "fish-chips"), ("Größe 2", "grosse-2"), ("  spaces  ", "spaces"), ("ABC", "abc")],
)
def test_the_default_slug_is_derived_from_the_name(template, run_cookiecutter, tmp_path, name, slug):
    assert run_cookiecutter(template, tmp_path, project_name=name).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [slug]


def run_interactively(template: Path, output: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run cookiecutter interactively with `lines` as its input."""
    command = [sys.executable, "-m", "cookiecutter", str(template), "-o", str(output)]
    environment = os.environ | {"HOME": str(output), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, input="\n".join([*lines, ""]), capture_output=True, text=True)


def test_jinja_markup_in_an_answer_is_rejected_before_the_next_question(template, tmp_path):
    done = run_interactively(template, tmp_path, "{{ 7 * 7 }}")
    assert done.returncode == 1
    assert "project_name '{{ 7 * 7 }}' has template markup" in done.stderr
    assert "Project slug" not in done.stdout
    assert not (tmp_path / "49").exists()


def test_the_prompts_are_descriptive_and_enter_selects_the_defaults(template, tmp_path):
    done = run_interactively(template, tmp_path, "Leaf spots", *[""] * (3 + len(CHOICES)))
    assert done.returncode == 0, done.stderr
    for text in ("Project name", "Project slug (directory and package name)", "Data set", "Toolkit"):
        assert text in done.stdout
    assert (tmp_path / "leaf-spots/train.py").is_file()
