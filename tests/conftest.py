"""One Ray cluster for the whole test session; small models that every test can afford."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for a test alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray cluster with 4 logical CPUs."""
    from pipelines.cluster import ray_session

    with ray_session(num_cpus=4):
        yield
