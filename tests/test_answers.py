"""A bad answer gets one line and leaves nothing on disk; an odd one gives a sound repository."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from cookiecutter.cli import main
from options import CHOICES

LONG = "x" * 61


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"project_slug": "../x"}, "project_slug '../x' is no good name for a folder"),
        ({"project_slug": "/tmp/x"}, "project_slug '/tmp/x' is no good name for a folder"),
        ({"project_slug": "a/b"}, "is no good name for a folder"),
        ({"project_slug": "My Experiment"}, "is no good name for a folder"),
        ({"project_slug": "-rf"}, "is no good name for a folder"),
        ({"project_slug": "1st"}, "is no good name for a folder"),
        ({"project_slug": "größe"}, "is no good name for a folder"),
        ({"project_slug": "a--b"}, "is no good name for a folder"),
        ({"project_slug": LONG}, f"project_slug '{LONG}' has 61 characters; use at most 60."),
        ({"project_slug": "con"}, "project_slug 'con' is a reserved name; use another, such as con-experiment."),
        ({"project_slug": "lpt1"}, "is a reserved name"),
        ({"project_slug": "class"}, "is a reserved name"),
        ({"project_slug": "torch"}, "is a reserved name"),
        ({"project_slug": "scikit_learn"}, "is a reserved name; use another, such as scikit_learn-experiment."),
        ({"project_slug": "packaging"}, "is a reserved name"),
        ({"project_slug": "node_modules"}, "is a reserved name"),
        ({"project_name": " "}, "project_name is empty; give some text."),
        ({"project_name": "🙂"}, "project_slug '' is no good name for a folder"),
        ({"project_name": "x" * 201}, "project_name has 201 characters; give at most 200."),
        ({"description": "a\nb"}, "description 'a\\nb' has a line break or control character"),
        ({"author": "{% raw %}"}, "the answer '{% raw %}' has template marks such as {{ or {%"),
        ({"author": "\x7f"}, "has a line break or control character"),
        ({"description": "{{ 7 * 7 }}"}, "the answer '{{ 7 * 7 }}' has template marks such as {{ or {%"),
        ({"description": "{{"}, "the answer '{{' has template marks"),
        ({"author": "{{ 1 / 0 }}"}, "has template marks"),
        ({"project_name": "{{ cookiecutter.nothing }}"}, "has template marks"),
        ({"project_slug": "# {% include 'x' %}"}, "has template marks"),
    ],
)
def test_a_bad_answer_is_refused_in_one_line_with_nothing_left_on_disk(template, tmp_path, answers, sentence):
    output = tmp_path / "out"
    output.mkdir()
    # The command in this process: a process for each would take ten seconds more, of imports alone.
    extra = [f"{name}={text}" for name, text in answers.items()]
    home = {"HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    done = CliRunner(env=home).invoke(main, [str(template), "--no-input", "-o", str(output), *extra])
    assert done.exit_code == 1
    assert sentence in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not list(output.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("value", ["", "true"])
def test_an_answer_of_a_config_file_that_is_no_text_is_refused(template, run_cookiecutter, tmp_path, value):
    config = tmp_path / "config.yaml"
    config.write_text(f"default_context:\n  author: {value}\n")
    done = run_cookiecutter(template, tmp_path, "--config-file", str(config))
    assert done.returncode == 1
    assert "is no text; put it in quotes." in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("answers", [{"license": "GPL"}, {"data_set": "imagenet"}, {"tracker": "paper"}])
def test_a_choice_that_is_none_is_refused_by_cookiecutter_with_those_there_are(
    template, run_cookiecutter, tmp_path, answers
):
    # cookiecutter 2.7 says so with a traceback of its own, before anything of the template runs.
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
def test_an_odd_description_and_author_come_through_unchanged(template, run_cookiecutter, tmp_path, text):
    done = run_cookiecutter(template, tmp_path, description=text, author=text)
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((tmp_path / "my-experiment/pyproject.toml").read_text())["project"]
    assert project["description"] == text
    assert project["authors"] == [{"name": text}]
    assert text in (tmp_path / "my-experiment/README.md").read_text()
    assert text in (tmp_path / "my-experiment/LICENSE").read_text()


def test_a_terminal_that_cannot_show_the_name_is_no_reason_to_end(template, run_cookiecutter, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_cookiecutter(template, tmp_path, project_name="Leaf spots 🙂")
    assert (done.returncode, "Leaf spots ? is ready." in done.stdout) == (0, True), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="written for a shell of Unix")
@pytest.mark.parametrize("outlet", [">&-", "| true", ">/dev/full"])
def test_an_output_that_is_closed_or_full_is_no_reason_to_end(template, tmp_path, outlet):
    command = f'"{sys.executable}" -m cookiecutter "{template}" --no-input -o "{tmp_path}" {outlet}'
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (tmp_path / "my-experiment/LICENSE").is_file()
    assert not (tmp_path / "my-experiment/.variants").exists()


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Fish & chips!", "fish-chips"), ("Größe 2", "grosse-2"), ("  spaces  ", "spaces"), ("ABC", "abc")],
)
def test_the_slug_follows_from_the_name(template, run_cookiecutter, tmp_path, name, slug):
    assert run_cookiecutter(template, tmp_path, project_name=name).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [slug]


def ask(template: Path, output: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run cookiecutter with these lines typed at its questions."""
    command = [sys.executable, "-m", "cookiecutter", str(template), "-o", str(output)]
    environment = os.environ | {"HOME": str(output), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, input="\n".join([*lines, ""]), capture_output=True, text=True)


def test_jinja_that_is_typed_at_a_question_is_refused_before_the_next_question(template, tmp_path):
    done = ask(template, tmp_path, "{{ 7 * 7 }}")
    assert done.returncode == 1
    assert "project_name '{{ 7 * 7 }}' has template marks" in done.stderr
    assert "Its folder" not in done.stdout
    assert not (tmp_path / "49").exists()


def test_the_questions_are_asked_in_words_and_enter_takes_the_defaults(template, tmp_path):
    done = ask(template, tmp_path, "Leaf spots", *[""] * (3 + len(CHOICES)))
    assert done.returncode == 0, done.stderr
    for text in ("What is the experiment called?", "Its folder and package name", "Which data does it start from?"):
        assert text in done.stdout
    assert (tmp_path / "leaf-spots/train.py").is_file()
