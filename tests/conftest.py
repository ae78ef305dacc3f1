"""One Ray cluster for the whole test session, and tokenizers that several folders use."""

from __future__ import annotations

import os
from contextlib import ExitStack

# In the processes that tests start, too: as many threads as cores in each of several processes wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray's workers give way to every other process by default, and miss deadlines where one is busy.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (the name Ray reads)

import pytest
import tokenizer_files
import torch
from hypothesis import HealthCheck, settings
from tokenizer_files import write_files

import pipelines  # noqa: F401  # sets Ray's environment before a test file imports Ray
from model.tokenizer import load_tokenizer

torch.set_num_threads(1)

# No verdict depends on time or chance: examples may be slow on a busy machine, and every run draws the same ones.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

LONGEST = ("test_exact_resume", "test_train", "test_chaos", "test_evidence_steps", "test_interpreted", "test_compiled",
           "test_driver", "test_stopping", "test_sharded_training", "test_speculation", "test_sweep_spaces",
           "test_hostile_input")  # fmt: skip
"""Files that take half a minute and more. Begun first, none of them is still running when all others are done."""


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
    from pipelines.ray_runtime.session import ray_session

    with ExitStack() as session:
        try:
            session.enter_context(ray_session(num_cpus=4))
        except FiftyfoldError as error:  # after a second attempt
            pytest.fail(str(error), pytrace=False)
        yield


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A byte-level tokenizer with 38 printable tokens, some of two letters."""
    return load_tokenizer(write_files(tmp_path_factory.mktemp("letters"), tokenizer_files.letters()))


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory):
    """A tokenizer like Llama's: "▁" marks spaces, decoding strips the first one, unknown characters become bytes."""
    return load_tokenizer(write_files(tmp_path_factory.mktemp("fallback"), tokenizer_files.byte_fallback("abcdefghij")))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer with a special token besides BOS and EOS, ID 258."""
    content = tokenizer_files.byte_level(added=["<|im_end|>"])
    return load_tokenizer(write_files(tmp_path_factory.mktemp("level"), content))
