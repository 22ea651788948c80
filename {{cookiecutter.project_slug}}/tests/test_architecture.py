"""Packages import only what their layer allows, and the code keeps its size."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LAYERS = {
    "core": 0,
    "distributed": 1,
    "tracking": 1,
    "metrics": 1,
    "models": 1,
    "data": 2,
    "checkpoint": 2,
    "training": 3,
    "evaluation": 4,
    "run": 4,
}
TOP_LAYER = 5  # of all other packages
TRAIN_NAMES = {"Config", "Stage", "build_state", "build_optimizer", "make_loaders", "train_fn", "valid_fn"}
PROCESS_NAMES = {"rank", "local_rank", "world_size", "is_rank_zero", "is_launched", "distributed"}
MAX_FUNCTION_LINES = 60


class Import(NamedTuple):
    """One import statement, or one name of it."""

    file: str
    line: int
    module: str  # a module of this repository if there is one, otherwise as it is written
    name: str  # the name that is taken from it, if any

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def python_files() -> list[Path]:
    """List the code that is subject to the rules: all but the tests."""
    directories = ("batteries", "experiment", "tools")
    return [ROOT / "train.py", *(file for name in directories for file in sorted((ROOT / name).rglob("*.py")))]


def module_name(file: Path) -> str:
    """Return the name by which a file is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in python_files()}


def imports_of(file: Path) -> Iterator[Import]:
    """List all imports of a file: lazy ones, those for type checkers, and calls of import_module with a text."""
    place = file.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(place, node.lineno, alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in MODULES:
                    yield Import(place, node.lineno, inner, "")
                else:
                    yield Import(place, node.lineno, source, alias.name)
        elif isinstance(node, ast.Call) and (name := dynamic_import(node)):
            yield Import(place, node.lineno, name, "")


def dynamic_import(call: ast.Call) -> str:
    """Return the module that import_module or __import__ is called with, up to the first value in it."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if function not in ("import_module", "__import__") or not arguments:
        return ""
    text: ast.expr = arguments[0]
    while isinstance(text, ast.JoinedStr | ast.BinOp):
        text = text.left if isinstance(text, ast.BinOp) else text.values[0]
    return text.value.rstrip(".") if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""


def package_of(module: str) -> str:
    """Return the package of batteries that a module belongs to; `batteries` for the top itself, else an empty text."""
    parts = module.split(".")
    if parts[0] != "batteries":
        return ""
    return parts[1] if len(parts) > 1 else "batteries"


def packages() -> set[str]:
    """List the packages of batteries."""
    return {path.parent.name for path in (ROOT / "batteries").glob("*/__init__.py")}


def layer_of(package: str) -> int:
    return LAYERS.get(package, TOP_LAYER)


def all_imports() -> list[Import]:
    return [found for file in python_files() for found in imports_of(file)]


def in_directory(directory: str) -> list[Import]:
    return [found for found in all_imports() if found.file.startswith(f"{directory}/")]


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file.relative_to(ROOT).as_posix(), node


def test_packages_are_those_of_the_table():
    assert LAYERS.keys() <= packages()
    assert {path.name for path in (ROOT / "batteries").glob("*.py")} == {"__init__.py"}
    for package in packages():
        docstring = ast.get_docstring(ast.parse((ROOT / f"batteries/{package}/__init__.py").read_text())) or ""
        assert docstring.startswith(f"Layer {layer_of(package)}: "), package


def test_architecture_page_has_the_same_table():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = {name: int(layer) for name, layer in re.findall(r"^\| `batteries\.(\w+)` \| (\d) \|", text, re.MULTILINE)}
    assert rows == {name: layer_of(name) for name in packages()}


def test_packages_import_only_lower_layers():
    for found in in_directory("batteries"):
        own = Path(found.file).parts[1]
        other = package_of(found.module)
        if other and other != own:
            assert other in packages(), f"{found.place}, which is not a package"
            assert layer_of(other) < layer_of(own), f"{found.place}: {own} is in layer {layer_of(own)}"


def test_batteries_imports_nothing_of_the_experiment():
    for found in in_directory("batteries"):
        assert found.module.split(".")[0] not in ("experiment", "tools", "train"), found.place


def test_experiment_imports_only_core_data_and_metrics():
    for found in in_directory("experiment"):
        assert found.module.split(".")[0] not in ("tools", "train"), found.place
        assert package_of(found.module) in ("", "core", "data", "metrics", "models"), found.place


def test_tools_import_no_tool_and_only_options_and_builders_of_train():
    for found in in_directory("tools"):
        assert found.module.split(".")[0] != "tools", found.place
        if found.module == "train":
            assert found.name in TRAIN_NAMES, f"{found.place}: {found.name or 'the whole module'}"


def test_train_imports_no_tool():
    for found in all_imports():
        assert not (found.file == "train.py" and found.module.split(".")[0] == "tools"), found.place


def test_no_import_is_relative():
    for found in all_imports():
        assert not found.module.startswith("."), found.place


def test_imported_modules_exist():
    for found in all_imports():
        if found.module.split(".")[0] in ("batteries", "experiment", "tools", "train"):
            assert found.module in MODULES, f"{found.place}, which does not exist"


def test_modules_have_no_import_cycle():
    needed = {name: {found.module for found in imports_of(file)} & MODULES.keys() for name, file in MODULES.items()}
    while leaves := {name for name, others in needed.items() if not others & needed.keys()}:
        needed = {name: others for name, others in needed.items() if name not in leaves}
    assert not needed, f"a cycle among {sorted(needed)}"


def test_init_files_have_a_docstring_only():
    for name, file in MODULES.items():
        if file.name == "__init__.py":
            [statement] = ast.parse(file.read_text(encoding="utf-8")).body
            assert isinstance(statement, ast.Expr), name
            assert isinstance(statement.value, ast.Constant), name


def test_the_top_has_one_python_file():
    assert [path.name for path in ROOT.glob("*.py")] == ["train.py"]


def test_functions_of_the_toolkit_stay_short():
    for file, node in functions():
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if file.startswith("batteries/"):
            assert length <= MAX_FUNCTION_LINES, f"{file}: {node.name} has {length} lines"


def test_train_experiment_and_tools_do_not_use_ranks():
    for file in python_files():
        if not file.is_relative_to(ROOT / "batteries"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            assert not names & PROCESS_NAMES, file
            assert "batteries.core.ranks" not in {found.module for found in imports_of(file)}, file
