from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from model.config import ModelConfig
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer

# Weights this wide give a random model sharp opinions, so that its greedy text is varied and ties do not occur.
VARIED = {"init_std": 0.3, "zero_init_output": False, "max_positions": 512}


def random_model(vocab_size: int, seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig.from_preset("tiny", vocab_size=vocab_size, **VARIED, **changes)).eval()


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
def byte_model() -> Transformer:
    return random_model(258)


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Hugging Face tokenizer of 38 tokens, all printable, some of two letters."""
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
    """As Llama's: words begin with a visible space that decoding strips at the start, unknown characters are bytes."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij"]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    path: Path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def letters_model(letters: Tokenizer) -> Transformer:
    return random_model(letters.vocab_size, seed=1)


@pytest.fixture(scope="session")
def endless_model(letters: Tokenizer) -> Transformer:
    """Never ends a text by itself: in a model with opinions a logit of zero is as good as never the largest."""
    model = random_model(letters.vocab_size, seed=1)
    with torch.no_grad():
        model.head.weight[letters.eos_id] = 0.0
    return model
