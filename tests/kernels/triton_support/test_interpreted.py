"""Triton kernels against the references, in Triton's interpreter.

The interpreter is chosen when triton is imported, for a whole process. The tests of every ``interpreted_<op>.py``
therefore run in a process of their own, one for all: importing takes longer than the tests of most kernels.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = sorted(path.name for path in HERE.glob("interpreted_*.py"))


@pytest.mark.timeout(1200)  # a guard against hanging: tests of all kernels
def test_kernels_agree_with_the_reference():
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    settings.pop("PYTEST_XDIST_WORKER", None)
    files = [str(HERE / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    found = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-1000:]
    assert set(re.findall(r"(interpreted_\w+\.py) \.", found.stdout)) == set(FILES)  # each has tests


def test_every_operation_with_a_backend_is_tested():
    operations = {path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernels.py")}
    assert {f"interpreted_{operation}.py" for operation in (*operations, "shapes")} == set(FILES)
