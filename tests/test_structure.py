"""The house's one rule: imports go downwards only."""

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
"""What the two lower rooms may import: they run on machines without Ray, MLflow or a web server."""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_downwards(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        upwards = (imports_of(path) & set(ALLOWED)) - ALLOWED[room]
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


@pytest.mark.parametrize("room", ["kernels", "model"])
def test_lower_rooms_need_torch_only(room):
    for path in (ROOT / room).rglob("*.py"):
        foreign = imports_of(path) - set(sys.stdlib_module_names) - TORCH_ONLY - set(ALLOWED)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_kernels_package_is_empty():
    # transformers executes whatever kernels/__init__.py it finds.
    assert (ROOT / "kernels/__init__.py").read_text() == ""


def test_no_room_has_a_long_file():
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 600, path
