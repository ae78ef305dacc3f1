"""Environment variables that the package sets before Ray and MLflow read them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("address", "mode"), [(None, "disabled"), ("", "disabled"), ("10.0.0.1:6379", "")])
def test_a_private_cluster_needs_no_token(address, mode):
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment = kept if address is None else {**kept, "RAY_ADDRESS": address}
    code = "import os, pipelines; print(os.environ.get('RAY_AUTH_MODE', ''))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert found.stdout.strip() == mode, found.stderr
