"""Made-up answers of every kind: each gives a sound repository, or one line that refuses it and nothing on disk."""

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

# What any text may hold, and what none may.
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
    """The template without the files that are copied as they are, which no answer can change."""
    folder = tmp_path_factory.mktemp("small") / "batteries"
    wanted = ("cookiecutter.json", "batteries_answers.py", "hooks/post_gen_project.py")
    parts = ("README.md", "pyproject.toml", ".variants/license/MIT/LICENSE")
    for name in (*wanted, *(f"{SLUG}/{part}" for part in parts)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(template / name, folder / name)
    return folder


@given(project_name=NAMES, slug=SLUGS, description=TEXTS, author=TEXTS)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_any_answer_gives_a_sound_repository_or_one_line(small_template, project_name, slug, description, author):
    answers = {"project_name": project_name, "description": description, "author": author}
    answers |= {} if slug is None else {"project_slug": slug}
    with tempfile.TemporaryDirectory() as name:
        output = Path(name, "out")
        output.mkdir()
        refusal = render_or_refuse(small_template, output, answers)
        folders = list(output.iterdir())
        if refusal:
            assert len(refusal.splitlines()) == 1
            assert not folders
        else:
            assert_sound(*folders, answers)
        target(float(not refusal))


def render_or_refuse(template: Path, output: Path, answers: dict[str, str]) -> str:
    """The sentence that refuses the answers, or nothing and a repository in `output`."""
    config = output.parent / "config.json"
    config.write_text(json.dumps({"replay_dir": str(output.parent), "cookiecutters_dir": str(output.parent)}))
    options = {"no_input": True, "extra_context": answers, "output_dir": str(output), "config_file": str(config)}
    try:
        cookiecutter(str(template), **options)
    except click.ClickException as refusal:
        return refusal.message
    return ""


def assert_sound(folder: Path, answers: dict[str, str]) -> None:
    """The folder's name is one anywhere, and each answer stands where it should, as it was given."""
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
