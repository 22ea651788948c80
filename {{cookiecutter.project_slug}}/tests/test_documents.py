"""README.md, AGENTS.md and docs/*.md: each path, link, option, command and message in them is real."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from documents import BLOCK, ROOT, code_blocks, exists, page_paths, read_page, section, without_code_blocks

from batteries.core.command_line import parse
from batteries.core.errors import UserError
from train import Config, Stage

PAGES = page_paths()
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
# Options of other programs: mlflow, docker, sbatch, pip.
FOREIGN_OPTIONS = {"backend-store-uri", "shm-size", "nodes", "gpus-per-node", "time", "group", "index-url", "name"}
FOREIGN_OPTIONS |= {"variables-to-update", "extra"}  # of cruft and uv
SCRIPT_OPTIONS = {"seeds", "all-folds"}  # of a launch script for several seeds
CODE_DIRECTORIES = ("batteries", "docs", "experiment", "scripts", "tests", "tools")


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_code_blocks((ROOT / page).read_text(encoding="utf-8")), re.MULTILINE)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub and GitLab make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(text: str) -> list[str]:
    """List the targets of links to files and headings."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code_blocks(text))


def first_branches(text: str) -> str:
    """Drop the alternatives (elif, else) of Jinja blocks; what is left has about the length of a rendered document."""
    kept: list[str] = []
    is_first: list[bool] = []
    for line in text.splitlines():
        if not line.startswith(BLOCK):
            if all(is_first):
                kept.append(line)
        elif re.match(r"# \S+ if ", line):
            is_first.append(True)
        elif re.match(r"# \S+ endif ", line):
            is_first.pop()
        else:
            is_first[-1] = False
    return "\n".join(kept) + "\n"


def test_readme_has_at_most_150_lines_and_agents_50():
    for page, limit in (("README.md", 150), ("AGENTS.md", 50)):
        assert first_branches((ROOT / page).read_text(encoding="utf-8")).count("\n") <= limit, page


def test_readme_links_to_every_page_of_docs():
    linked = {link.partition("#")[0] for link in links(read_page("README.md"))}
    assert set(PAGES) - {"README.md", "AGENTS.md"} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in links(read_page(page)):
        path, _, fragment = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        if fragment:
            name = target.relative_to(ROOT).as_posix()
            assert fragment in {anchor(heading) for heading in headings(name)}, link


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    pattern = rf"(?<![\w./-])(?:{'|'.join(CODE_DIRECTORIES)})/[\w./-]*"
    for path in re.findall(pattern, read_page(page)):
        assert exists(path.rstrip("./")), path
    for name in re.findall(r"(?<![\w./-])(\w+\.(?:py|sh|toml)|Makefile)\b", " ".join(code_spans(read_page(page)))):
        assert exists(name) or name == "__init__.py", name


def test_every_launch_script_is_documented():
    text = "".join(read_page(page) for page in PAGES)
    for script in (ROOT / "scripts").glob("*.sh"):
        assert f"scripts/{script.name}" in text or script.name == "common.sh", script.name


def test_readme_layout_lists_every_package_tool_and_file_of_experiment():
    drawn = paths_in_tree(section(read_page("README.md"), "Repository layout"))
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "_"))}
    assert {path for path in drawn if "/" not in path} == top - {"README.md", "AGENTS.md", "LICENSE", "uv.lock"}
    for directory, pattern in (("experiment", "[!_]*.py"), ("tools", "[!_]*.py"), ("batteries", "*/__init__.py")):
        paths = [path.parent if path.name == "__init__.py" else path for path in (ROOT / directory).glob(pattern)]
        expected = {f"{directory}/{path.name}" for path in paths}
        found = {path for path in drawn if path.startswith(f"{directory}/")}
        assert expected <= found
        assert all(exists(path) for path in found - expected), found - expected


def paths_in_tree(text: str) -> set[str]:
    """Collect the paths of a drawn tree; one line may have several names."""
    paths: set[str] = set()
    parents: list[str] = []
    for prefix, rest in re.findall(r"^([│ ]*)[├└]── (.*)$", text, re.MULTILINE):
        for word in rest.split():
            if not re.fullmatch(r"\w+/|\w+\.\w+|Makefile", word):
                break
            parents[len(prefix) // 4 :] = [word.rstrip("/")]
            paths.add("/".join(parents))
    return paths


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page):
    known = known_options() | FOREIGN_OPTIONS | SCRIPT_OPTIONS
    for option in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", read_page(page)):
        assert option.rstrip(".").removeprefix("no-") in known, f"--{option}"


def known_options() -> set[str]:
    """Collect the options of train.py and of all tools, as they are written on the command line."""
    modules = [importlib.import_module(name) for name in ("train", *(f"tools.{tool}" for tool in TOOLS))]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    names = {field.name for item in classes if dataclasses.is_dataclass(item) for field in dataclasses.fields(item)}
    names |= {f"stages.{number}.{field.name}" for number in (0, 1) for field in dataclasses.fields(Stage)}
    return {name.replace("_", "-") for name in names} | {"config", "help"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for command, arguments in commands_of(read_page(page)):
        with contextlib.suppress(SystemExit):  # --help exits with 0; an error is a UserError
            parse_command(command, arguments)


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """List (train or the name of a tool, arguments) of all commands without shell variables."""
    lines = [line for language in ("bash", "sh") for code in code_blocks(text, language) for line in code.splitlines()]
    found = []
    for line in [*lines, *code_spans(text)]:
        for part in re.split(r"\|\||;| \| |  #", line):
            part = re.sub(r"\b[A-Z_]+=\S+ ", "", part)  # variables of the environment
            part = re.sub(r"(?<=train_seeds\.sh)(.*?) (--seeds \d+|--all-folds)\b", r"\1", part)  # of the script itself
            match = re.search(r"(?:scripts/train_\w+\.sh|python tools/(\w+)\.py)(?=\s|$)(.*)", part)
            if match and "$" not in part:
                found.append((match[1] or "train", shlex.split(match[2])))
    return found


def parse_command(command: str, arguments: list[str]) -> None:
    if "--config" in arguments:
        place = arguments.index("--config")
        assert arguments[place + 1].endswith(("config.json", "best.json"))
        arguments = arguments[:place] + arguments[place + 2 :]
    if command == "sweep" and "--" in arguments:
        place = arguments.index("--")
        parse_command("train", arguments[place + 1 :])
        arguments = arguments[:place]
    module: Any = importlib.import_module("train" if command == "train" else f"tools.{command}")
    parameter, *_ = inspect.signature(module.main).parameters.values()
    options = getattr(module, "COMMANDS", parameter.annotation)  # of a tool with subcommands
    if arguments:
        parse(options, arguments, repeats=isinstance(options, type) and issubclass(options, Config))


# What a command may need besides options: files, or a subcommand.
REQUIRED: list[list[str]] = [[], ["a.csv"], ["a.csv", "b.csv"], ["add", "logs/a"], ["plot"]]


@pytest.mark.parametrize("page", PAGES)
def test_values_of_options_are_valid_for_a_command(page):
    for span in code_spans(read_page(page)):
        arguments = shlex.split(span) if span.startswith("--") and " " in span else []
        if arguments:
            assert any(is_accepted(command, arguments) for command in ["train", *TOOLS]), span


def is_accepted(command: str, arguments: list[str]) -> bool:
    for required in REQUIRED:
        with contextlib.suppress(UserError):
            parse_command(command, [*required, *arguments])
            return True
    return False


def test_the_pages_have_commands_to_parse():
    assert sum(len(commands_of(read_page(page))) for page in PAGES) >= 30


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_parse_and_their_imports_work(page):
    for code in code_blocks(read_page(page), "python"):
        for statement in ast.parse(textwrap.dedent(code)).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                exec(ast.unparse(statement), {})


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for span in code_spans(read_page(page)):
        for target in re.findall(r"\bmake ([a-z-]+)$", span):
            assert target in targets, target


@pytest.mark.parametrize("page", ["README.md", "docs/troubleshooting.md"])
def test_explained_messages_are_in_the_code(page):
    files = [file for directory in ("batteries", "experiment", "tools") for file in (ROOT / directory).rglob("*.py")]
    strings = [text for file in [ROOT / "train.py", *files] for text in strings_of(file)]
    strings += [file.read_text() for file in (ROOT / "scripts").glob("*.sh")]
    table = read_page(page).partition("\n| Message |")[2].partition("\n\n")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) >= (3 if page == "README.md" else 10)
    for message in messages:
        assert any(message in text for text in strings), message


def strings_of(file: Path) -> list[str]:
    """List the strings of a file; a value in an f-string becomes `…`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_names_in_the_architecture_page_are_defined():
    files = [ROOT / "train.py", *(ROOT / "batteries").rglob("*.py"), *(ROOT / "experiment").glob("*.py")]
    files += (ROOT / "tools").glob("*.py")
    names = {name for file in files for name in names_of(file)} | {path.stem for path in files}
    names |= {path.name for path in (ROOT / "batteries").iterdir()} | {"batteries", "tools", "experiment", "os"}
    spans = [
        span for span in code_spans(read_page("docs/architecture.md")) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span)
    ]
    spans = [span for span in spans if not re.search(r"\.(?:py|pth|json|md)$", span)]
    assert len(spans) >= 20
    for span in spans:
        missing = [part for part in span.removesuffix("()").split(".") if part not in names]
        assert not missing, span


def names_of(file: Path) -> set[str]:
    """Collect the functions, classes, attributes and variables of a file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found
