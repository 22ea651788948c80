"""Check that texts and names follow the glossary: `python .ci/check_glossary.py [FILE …]`.

Reads glossary.toml. In Python files it checks docstrings, comments, strings and the names that a file defines; in all
other text files every line. A line with `glossary: allow` is not checked. Prints one line per finding; exit code 1 if
there is any.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = tomllib.loads((ROOT / ".ci/glossary.toml").read_text(encoding="utf-8"))
TEXT = {
    re.compile(r"\b(?:" + pattern.replace(" ", r"\s+") + r")\b", re.IGNORECASE): instead
    for pattern, instead in GLOSSARY["text"].items()
}
NAMES: dict[str, str] = GLOSSARY["identifiers"]
ALLOW = "glossary: allow"
SUFFIXES = {".py", ".md", ".sh", ".toml", ".json", ".yml", ".yaml", ".cff", ""}
SKIPPED = ("LICENSE", ".ci/glossary.toml", ".ci/check_glossary.py")


def main(arguments: list[str]) -> int:
    """Check the files that are given, or all files of the repository; return the exit code."""
    paths = [Path(argument).resolve() for argument in arguments] or list_files()
    findings = [finding for path in paths for finding in check_file(path)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def list_files() -> list[Path]:
    """List the text files that git tracks, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name and Path(name).suffix in SUFFIXES]
    return [path for path in paths if path.is_file()]


def check_file(path: Path) -> Iterator[str]:
    """List the findings in one file."""
    name = path.relative_to(ROOT).as_posix()
    if name.endswith(SKIPPED):
        return
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, piece in python_texts(text) if path.suffix == ".py" else [(1, text)]:
        for pattern, instead in TEXT.items():
            for found in pattern.finditer(piece):
                line = number + piece.count("\n", 0, found.start())
                if not is_allowed(lines, line):
                    yield f"{name}:{line}: {' '.join(found[0].split())!r}; write {instead}"
    if path.suffix == ".py":
        for number, identifier in defined_names(text):
            for part in identifier.lower().split("_"):
                if part in NAMES and not is_allowed(lines, number):
                    yield f"{name}:{number}: name {identifier}; write {NAMES[part]}"


def is_allowed(lines: list[str], number: int) -> bool:
    """Return whether line `number` (from 1) is exempt."""
    return number <= len(lines) and ALLOW in lines[number - 1]


def python_texts(text: str) -> Iterator[tuple[int, str]]:
    """List (first line, text) for comments, strings and the names of tests; lines that follow each other are joined."""
    start, joined, end = 0, "", 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING):
            continue
        if joined and token.start[0] == end + 1:
            joined += "\n" + plain(token.string)
        else:
            if joined:
                yield start, joined
            start, joined = token.start[0], plain(token.string)
        end = token.end[0]
    if joined:
        yield start, joined
    for number, name in defined_names(text):
        if name.startswith("test_"):
            yield number, name.replace("_", " ")


def plain(string: str) -> str:
    """Remove the marks of a comment or string, so that a phrase that continues on the next line is found."""
    return string.lstrip("# ").lstrip("rbfRBF").strip("\"'")


def defined_names(text: str) -> Iterator[tuple[int, str]]:
    """List (line, name) for functions, classes, arguments and assigned variables."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
