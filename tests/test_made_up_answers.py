"""Random answers of every kind give either a valid repository, or a one-line error and nothing on disk."""

import json
import keyword
import shutil
import tempfile
import tomllib
from pathlib import Path

import click
import pytest
from conftest import SLUG
from cookiecutter.main import cookiecutter
from hypothesis import given, settings, target
from hypothesis import strategies as st

# Fragments that are allowed in a text, and fragments that are not.
ODD = ['"', "'", '"""', "'''", "\\", "\\n", "\\u0041", "`", "$(x)", "${x}", "%s", "#", "[x]", "<b>", "&amp;", "/"]
ODD += ["../", " ", "-", "_", ".", "🙂", "é", "日本", "\u202e", "\ufeff", "class", "con", "torch", "true", "null"]
ODD += ["1e9", "x" * 40]
BAD = ["{{", "}}", "{{ 7 * 7 }}", "{%", "# {% if x %}", "%}", "{#", "#}"]
BAD += ["\n", "\r", "\x00", "\x7f", "\u2028", "\ud800"]
ODD_TEXTS = st.lists(st.sampled_from(ODD) | st.text(st.characters(codec="utf-8"), max_size=2), min_size=1).map("".join)
BAD_TEXTS = st.tuples(ODD_TEXTS, st.sampled_from(BAD), ODD_TEXTS).map("".join)
TEXTS = st.one_of(*[ODD_TEXTS] * 12, BAD_TEXTS, st.just(""))
NAMES = st.tuples(st.sampled_from("aZ"), TEXTS).map("".join)
SLUGS = st.one_of(*[st.none()] * 4, TEXTS, st.text("ab1-_", min_size=1, max_size=8), st.sampled_from(["con", "class"]))


@pytest.fixture(scope="module")
def small_template(template, tmp_path_factory) -> Path:
    """The template without the files that are copied unchanged, to which no answer matters."""
    folder = tmp_path_factory.mktemp("small") / "batteries"
    names = [
        "cookiecutter.json",
        "batteries_answers.py",
        "cookiecutter_2_2_or_newer_is_needed.py",
        "hooks/post_gen_project.py",
        f"{SLUG}/README.md",
        f"{SLUG}/pyproject.toml",
        f"{SLUG}/.variants/license/MIT/LICENSE",
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(template / name, folder / name)
    return folder


@given(project_name=NAMES, slug=SLUGS, description=TEXTS, author=TEXTS)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_any_answer_gives_a_valid_repository_or_a_one_line_error(
    small_template, project_name, slug, description, author
):
    answers = {"project_name": project_name, "description": description, "author": author}
    answers |= {} if slug is None else {"project_slug": slug}
    with tempfile.TemporaryDirectory() as name:
        output = Path(name, "out")
        output.mkdir()
        error_message = render_or_reject(small_template, output, answers)
        folders = list(output.iterdir())
        if error_message:
            assert len(error_message.splitlines()) == 1
            assert not folders
        else:
            assert_valid(*folders, answers)
        target(float(not error_message))


def render_or_reject(template: Path, output: Path, answers: dict[str, str]) -> str:
    """Generate a repository in `output` and return an empty string, or return the error message."""
    config = output.parent / "config.json"
    config.write_text(json.dumps({"replay_dir": str(output.parent), "cookiecutters_dir": str(output.parent)}))
    try:
        cookiecutter(
            str(template), no_input=True, extra_context=answers, output_dir=str(output), config_file=str(config)
        )
    except click.ClickException as error:
        return error.message
    return ""


def assert_valid(folder: Path, answers: dict[str, str]) -> None:
    """Assert that the directory name is portable, and that each answer is in its place, unchanged."""
    name = folder.name
    assert name == answers.get("project_slug", name)
    assert name.replace("-", "_").isidentifier()
    assert name.isascii()
    assert name == name.lower()
    assert not keyword.iskeyword(name)
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == name
    assert project["description"] == answers["description"]
    assert project["authors"] == [{"name": answers["author"]}]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {answers['project_name']}\n\n{answers['description']}\n")
    assert answers["author"] in (folder / "LICENSE").read_text(encoding="utf-8")
