"""A Jinja extension that rejects a cookiecutter that is too old, before the first question.

Cookiecutter 1 cannot import modules of a template. It prints the name of the first extension, which is therefore the
rule: "Unable to load extension: No module named 'cookiecutter_2_2_or_newer_is_needed'".
"""

import re

import click
import cookiecutter
from jinja2 import Environment
from jinja2.ext import Extension

NEEDED = (2, 2)  # the first version that gives the hook the directory and the checkout of the template


class VersionCheck(Extension):
    """Check the version of the running cookiecutter."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        found = re.match(r"(\d+)\.(\d+)", cookiecutter.__version__)
        if found and (int(found[1]), int(found[2])) < NEEDED:
            fix = "use 2.2 or newer: pip install -U 'cookiecutter>=2.2'"
            raise click.ClickException(f"cookiecutter {cookiecutter.__version__} is too old; {fix}")
