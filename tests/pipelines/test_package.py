"""Environment variables that the package sets before Ray and MLflow read them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLES = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(("address", "value"), [(None, "0"), ("", "0"), ("10.0.0.1:6379", "None")])
def test_only_a_local_cluster_is_kept_on_loopback(address, value):
    """Interfaces stay unset: workers of a joined cluster import the package without its address."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", *VARIABLES)}
    environment = kept if address is None else {**kept, "RAY_ADDRESS": address}
    code = f"import os, pipelines; print(*(os.environ.get(name) for name in {VARIABLES}))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert found.stdout.split() == [value, "None", "None"], found.stderr
