from collections.abc import Callable, Iterator

import pytest
import torch

from model.config import ModelConfig
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer

# Large weights give a random model a peaked distribution: greedy text varies, and ties do not occur.
LARGE_WEIGHTS = {"init_std": 0.3, "zero_init_output": False, "max_positions": 512}


def random_model(vocab_size: int, seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig.from_preset("tiny", vocab_size=vocab_size, **LARGE_WEIGHTS, **changes)).eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture(scope="session")
def random_model_of() -> Callable[[int], Transformer]:
    """Function that returns a random model with a vocabulary of the given size."""
    return random_model


@pytest.fixture(scope="session")
def byte_model() -> Transformer:
    return random_model(258)


@pytest.fixture(scope="session")
def letters_model(letters: Tokenizer) -> Transformer:
    return random_model(letters.vocab_size, seed=1)


@pytest.fixture(scope="session")
def endless_model(letters: Tokenizer) -> Transformer:
    """A model that never generates EOS: its distribution is peaked, and the EOS logit is zero."""
    model = random_model(letters.vocab_size, seed=1)
    with torch.no_grad():
        model.head.weight[letters.eos_id] = 0.0
    return model


@pytest.fixture(scope="session")
def long_model(endless_model: Transformer) -> Transformer:
    """``endless_model`` with a context of 4,096 tokens, so that a completion can take long."""
    model = Transformer(endless_model.config.replace(max_positions=4096)).eval()
    model.load_state_dict(endless_model.state_dict())
    return model
