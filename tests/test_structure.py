"""The import rules: imports go downwards only, between rooms, between packages, and between modules."""

import ast
import sys
from pathlib import Path

import pytest

from model.mixers import MIXERS

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": {"kernels"},
    "model": {"kernels", "model"},
    "evals": {"kernels", "model", "evals"},
    "serve": {"kernels", "model", "serve"},
    "pipelines": {"kernels", "model", "evals", "serve", "pipelines"},
}
TORCH_ONLY = {"torch", "triton", "safetensors", "numpy", "yaml", "tokenizers", "gguf"}
"""Imports allowed in the two lower rooms, which run on machines without Ray, MLflow or a web server."""
PIPELINES = ("steps", "experiments", "ray_runtime", "training", "tracking", "data", "reports", "recipe")
"""Packages of pipelines/, from top to bottom."""
MODEL = ("hf", "checkpoint", "optim", "costs", "mixers", "cache", "forward", "layers", "distributed", "tokenizer")
"""Packages of model/, from top to bottom."""
MAX_LINES = 400


def statements_of(path: Path) -> list[ast.AST]:
    """Return the syntax tree's nodes, without imports that only type checkers read."""
    tree = ast.parse(path.read_text())
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return [node for node in ast.walk(tree) if id(node) not in annotations]


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, as far as ``import`` and ``from`` name modules."""
    found = set()
    for node in statements_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level_imports_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_downwards(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        upwards = (top_level_imports_of(path) & set(ALLOWED)) - ALLOWED[room]
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


@pytest.mark.parametrize(("room", "packages"), [("pipelines", PIPELINES), ("model", MODEL)])
def test_packages_import_downwards(room, packages):
    assert {path.parent.name for path in (ROOT / room).glob("*/__init__.py")} == set(packages)
    for place, package in enumerate(packages):
        for path in (ROOT / room / package).rglob("*.py"):
            imported = {name.split(".")[1] for name in imports_of(path) if name.startswith(f"{room}.")}
            upwards = imported & set(packages[:place])
            assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


@pytest.mark.parametrize("room", ["model", "pipelines"])
def test_modules_form_no_cycle(room):
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / room).rglob("*.py")}
    edges = {name: imports_of(path) & set(modules) - {name} for name, path in modules.items()}
    while edges:
        leaves = [name for name, below in edges.items() if not below & set(edges)]
        assert leaves, f"import cycle among {sorted(edges)}"
        for name in leaves:
            del edges[name]


def test_conditionals_outside_the_mixers_name_no_mixer():
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            if path.is_relative_to(ROOT / "model/mixers"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                inside = ast.walk(node) if isinstance(node, ast.Compare | ast.MatchValue) else ()
                named = {inner.value for inner in inside if isinstance(inner, ast.Constant)} & set(MIXERS)
                assert not named, f"{path.relative_to(ROOT)}:{node.lineno} compares {named}"


def test_only_the_demo_imports_other_steps():
    for path in (ROOT / "pipelines/steps").glob("*.py"):
        others = {name for name in imports_of(path) if name.startswith("pipelines.steps.")} - {"pipelines.steps.Step"}
        assert not others or path.stem == "demo", f"{path.relative_to(ROOT)} imports {others}"


@pytest.mark.parametrize("room", ["kernels", "model"])
def test_lower_rooms_need_torch_only(room):
    for path in (ROOT / room).rglob("*.py"):
        foreign = top_level_imports_of(path) - set(sys.stdlib_module_names) - TORCH_ONLY - set(ALLOWED)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_kernels_package_is_empty():
    # transformers executes whatever kernels/__init__.py it finds.
    assert (ROOT / "kernels/__init__.py").read_text() == ""


@pytest.mark.parametrize("room", ALLOWED)
def test_no_room_has_a_long_file(room):
    for path in (ROOT / room).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_no_two_test_files_share_a_name():
    # pytest imports a test file by its own name, without its folder.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 100 and sorted(names) == sorted(set(names))
