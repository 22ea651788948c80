"""The house is as README says, and its parts know only what they should."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batteries

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().partition("\n\nA plain PyTorch experiment")[2]  # title and sentence are yours
BLOCK = "{" + "%"  # what jinja's blocks begin with: they are in README until the template is rendered
VERBS = sorted(path.stem for path in ROOT.glob("*.py"))
TREE = re.search(r"## The house\n\n```\n(.*?)```", README, re.DOTALL)


def imports(file: Path) -> set[str]:
    """The modules that `file` imports, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module or "")
    return found


def paths_in_tree(tree: str) -> list[str]:
    """The paths that a drawn tree names."""
    paths, folders = [], []
    for line in tree.splitlines()[1:]:
        drawn = re.match(r"([│ ]*)[├└]── (\S+)", line)
        if drawn is None:
            assert line.startswith(f"# {BLOCK}") or re.fullmatch(r"│   │   [\w .]+", line), line  # or files of a kind
            continue
        depth = len(drawn[1]) // 4
        folders[depth:] = [drawn[2].rstrip("/")]
        paths.append("/".join(folders))
    return paths


@pytest.mark.parametrize(("package", "other"), [("batteries", "experiment"), ("experiment", "batteries")])
def test_experiment_and_batteries_never_import_each_other(package, other):
    for file in (ROOT / package).glob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] not in (other, "train"), f"{file} imports {name}"


def test_inside_batteries_no_import_goes_in_a_circle():
    inner = {
        f"batteries.{file.stem}": {name for name in imports(file) if name.startswith("batteries.")}
        for file in (ROOT / "batteries").glob("*.py")
        if file.stem != "__init__"
    }
    while leaves := {name for name, needed in inner.items() if not needed & inner.keys()}:
        inner = {name: needed for name, needed in inner.items() if name not in leaves}
    assert not inner, f"a circle among {sorted(inner)}"


def test_each_public_name_is_that_of_its_module_for_type_checkers_and_when_asked_for():
    tree = ast.parse((ROOT / "batteries/__init__.py").read_text())
    homes = {
        name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("batteries.")
        for name in node.names
    }
    assert sorted(homes) == sorted(batteries.__all__)
    for name, module in homes.items():
        assert getattr(batteries, name) is getattr(importlib.import_module(str(module)), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = batteries.nothing


def test_verbs_that_read_tables_wait_for_no_heavy_library(tmp_path):
    """They are started, and say what is wrong, without torch; each takes half a second so, and five with it."""
    (tmp_path / "a.csv").write_text("id,cat,dog\na,0.5,0.5\n")
    table = str(tmp_path / "a.csv")
    commands = [
        ["tools/blend.py", table, "nowhere.csv"],
        ["tools/blend.py", table, table, "--output", str(tmp_path / "out.csv")],
        ["tools/submit.py", table, "--sample", "nowhere.csv"],
        ["tools/scores.py", "show", "--ledger", str(tmp_path / "scores.csv")],
        ["tools/scores.py", "add", "nowhere"],
        ["tools/report.py", "nowhere"],
    ]
    code = (
        "import contextlib, runpy, sys\n"
        f"for sys.argv in {commands}:\n"
        "    with contextlib.suppress(SystemExit): runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('loaded', sorted({'torch', 'sklearn', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stdout + done.stderr
    assert done.stderr.count("error: ") == 4
    assert (tmp_path / "out.csv").exists()


def test_the_readme_draws_every_file_and_folder_that_is_there():
    assert TREE is not None
    drawn = set(paths_in_tree(TREE[1]))
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "_", "uv.lock"))}
    assert {path for path in drawn if "/" not in path} == top - {"README.md", "LICENSE"}
    for folder in ("batteries", "experiment", "scripts"):
        there = {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if not path.name.startswith("_")}
        missing = drawn - there if BLOCK in TREE[1] else set()  # in the template the tracker's script is not yet chosen
        assert {path for path in drawn if path.startswith(f"{folder}/")} - missing == there


def test_every_path_that_the_readme_names_is_real():
    made_by_a_run = ("logs/", "stage")
    for path in re.findall(r"`((?:tests|experiment|batteries|scripts)/[\w./]*|[\w]+\.py)", README):
        assert (ROOT / path).exists() or path.startswith(made_by_a_run), path


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    links = re.findall(r"\]\(#([\w-]+)\)", README)
    assert len(links) >= 5
    assert set(links) <= headings


def test_every_flag_that_the_readme_names_is_real():
    import dataclasses

    from train import Stage

    forms = [form for verb in VERBS for form in vars(importlib.import_module(verb)).values() if isinstance(form, type)]
    known = {field.name for form in forms if dataclasses.is_dataclass(form) for field in dataclasses.fields(form)}
    known |= {f"stages.{number}.{field.name}" for number in (0, 1) for field in dataclasses.fields(Stage)}
    known |= {"config", "help"}
    known |= {"backend_store_uri", "shm_size"}  # of mlflow and docker
    for flag in re.findall(r"--([a-z][\w.-]*)", README):
        assert flag.removeprefix("no-").replace("-", "_") in known, f"--{flag}"


def test_every_message_that_the_readme_explains_is_one_of_the_code():
    said = {text for file in (*ROOT.glob("*.py"), *ROOT.glob("batteries/*.py")) for text in texts(file)}
    said |= {file.read_text() for file in ROOT.glob("scripts/*.sh")}
    table = README.partition("## When something goes wrong")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(explained) >= 10
    for message in explained:
        assert any(message in text for text in said), message


def texts(file: Path) -> list[str]:
    """The strings of a file as they are said, with a mark for what is put in."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_train_py_stays_short_and_so_do_its_functions():
    assert (ROOT / "train.py").read_text().count("\n") <= 300
    for file in [*ROOT.glob("*.py"), *(ROOT / "batteries").glob("*.py"), *(ROOT / "experiment").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno
                assert length <= 60, f"{file.name}: {node.name} has {length} lines"


def test_train_py_and_experiment_do_not_ask_how_many_processes_there_are():
    for file in [*ROOT.glob("*.py"), *(ROOT / "experiment").glob("*.py")]:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not names & {"rank", "local_rank", "world_size", "is_main", "distributed"}, file
