"""The import rules: between rooms, and between the packages of pipelines/, imports go downwards only."""

import ast
import sys
from pathlib import Path

import pytest

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
PIPELINES = ("steps", "ray_runtime", "training", "tracking", "data", "reports", "recipe")
"""Packages of pipelines/, from top to bottom."""
MAX_LINES = {room: 600 for room in ALLOWED} | {"pipelines": 400}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, as far as ``import`` and ``from`` name modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


@pytest.mark.parametrize("package", PIPELINES)
def test_packages_of_pipelines_import_downwards(package):
    above = set(PIPELINES[: PIPELINES.index(package)])
    for path in (ROOT / "pipelines" / package).rglob("*.py"):
        imported = {name.split(".")[1] for name in imports_of(path) if name.startswith("pipelines.")}
        assert not imported & above, f"{path.relative_to(ROOT)} imports {imported & above}"


def test_all_packages_of_pipelines_are_ordered():
    assert {path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py")} == set(PIPELINES)


def test_modules_of_a_pipelines_package_form_no_cycle():
    for package in PIPELINES:
        modules = {path.stem: path for path in (ROOT / "pipelines" / package).glob("*.py") if path.stem != "__init__"}
        prefix = f"pipelines.{package}."
        edges = {}
        for name, path in modules.items():
            siblings = {i.removeprefix(prefix).split(".")[0] for i in imports_of(path) if i.startswith(prefix)}
            edges[name] = siblings & set(modules)
        while edges:
            leaves = [name for name, below in edges.items() if not below & set(edges)]
            assert leaves, f"pipelines/{package}: import cycle among {sorted(edges)}"
            for name in leaves:
                del edges[name]


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


@pytest.mark.parametrize(("room", "limit"), MAX_LINES.items())
def test_no_room_has_a_long_file(room, limit):
    for path in (ROOT / room).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= limit, path
