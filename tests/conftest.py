"""One Ray cluster for the whole test session; small models that every test can afford."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

torch.set_num_threads(1)

LONGEST = ("test_exact_resume", "test_train", "test_execution", "test_sharded_training", "test_cache")
"""Files that take minutes. Begun first, none of them is still running when all others are done."""


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for a test alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray cluster with 4 logical CPUs."""
    from model.errors import FiftyfoldError
    from pipelines.cluster import ray_session

    with ExitStack() as session:
        try:
            session.enter_context(ray_session(num_cpus=4))
        except FiftyfoldError as error:  # after a second attempt
            pytest.fail(str(error), pytrace=False)
        yield
