from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizer_files
import torch
from tokenizer_files import write_files
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

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
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Hugging Face tokenizer with 38 printable tokens, some of two letters."""
    pieces = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "he", "in", "er", "an", "re", "on", "at", "en"]
    merges = [tuple(piece) for piece in pieces[29:]]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    path: Path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer like Llama's: "▁" marks spaces, decoding strips the first one, unknown characters become bytes."""
    return load_tokenizer(write_files(tmp_path_factory.mktemp("fallback"), tokenizer_files.byte_fallback("abcdefghij")))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with a special token besides BOS and EOS, ID 258."""
    return load_tokenizer(
        write_files(tmp_path_factory.mktemp("level"), tokenizer_files.byte_level(added=["<|im_end|>"]))
    )


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
