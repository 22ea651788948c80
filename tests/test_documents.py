"""What the template's own README, CONTRIBUTING, CITATION and benchmarks say is so."""

import re
import tomllib
from pathlib import Path

import yaml
from options import CHOICES, QUESTIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


def test_every_link_to_a_file_leads_to_one():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for bracketed, plain in re.findall(r"\]\((?:<([^>]+)>|(?!http|#)([^)\s]+))\)", text):
            assert ((ROOT / page).parent / (bracketed or plain)).exists(), f"{page}: {bracketed or plain}"


def test_the_readme_names_every_question_and_every_answer():
    table = README.partition("## Questions that it asks")[2].partition("\n## ")[0]
    asked = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `")))
    assert set(asked) == {name for name in QUESTIONS if not name.startswith("_")}
    for question, answers in CHOICES.items():
        [row] = re.findall(rf"^\| `{question}` \|(.*)\|$", table, re.MULTILINE)
        named = set(re.findall(r"[\w.-]+", row))
        assert set(answers) <= named, question


def test_every_target_of_make_that_is_named_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: ([a-z-]+)", makefile, re.MULTILINE))
    benchmarks = re.search(r"^BENCHMARKS := (.*)$", makefile, re.MULTILINE)
    targets |= {f"bench-{name}" for name in benchmarks[1].split()}
    for page in PAGES:
        named = re.findall(r"(?:`|^)make ([a-z_-]+)\b", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) - {"bench-NAME", "bench-"} <= targets, page
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == set(benchmarks[1].split())


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
