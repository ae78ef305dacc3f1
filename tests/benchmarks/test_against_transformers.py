"""Comparison with transformers: equal weights, equal shapes of random and prefilled caches, and the script."""

import pytest
import torch

from benchmarks import against_transformers
from benchmarks.lib.contenders import OurNetwork, TransformersNetwork, write_weights
from benchmarks.lib.report import BEGIN, END
from model.config import ModelConfig
from model.errors import FiftyfoldError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    # Select every entry: with few index heads, many scores are tied at zero and would be selected differently.
    write_weights(ModelConfig.from_preset("tiny", index_topk=64), folder)
    return folder


def shapes(cache):
    """Return the contents of transformers' cache layers, with tensors replaced by shape and dtype."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return [{name: plain(value) for name, value in vars(layer).items()} for layer in cache.layers]


OTHERS = [pytest.param(tokens, marks=pytest.mark.long) for tokens in (15, 17, 63, 66)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [9, 16, 64, 131, *OTHERS])
def test_a_random_cache_of_transformers_has_the_shapes_of_a_prefilled_one(weights, tokens, precision):
    theirs = TransformersNetwork(weights / "rounded", precision)
    filled, read = theirs.new_cache(tokens), theirs.new_cache(tokens)
    theirs.fill(filled, tokens)
    theirs.prefill(read, torch.randint(0, 258, (1, tokens)), 32)
    assert shapes(filled) == shapes(read)
    theirs.decode(filled, torch.randint(0, 258, (1, 70)))
    theirs.decode(read, torch.randint(0, 258, (1, 70)))
    assert shapes(filled) == shapes(read)


def test_both_networks_have_the_same_weights(weights):
    for side in (OurNetwork, TransformersNetwork):
        rounded, plain = (side(weights / folder).model.state_dict() for folder in ("rounded", "plain"))
        assert all(torch.equal(rounded[name], plain[name]) for name in rounded)
    ids = torch.randint(0, 258, (1, 200))
    logits = []
    for network in (OurNetwork(weights / "plain"), TransformersNetwork(weights / "plain")):
        cache = network.new_cache(200)
        network.prefill(cache, ids[:, :150], 64)
        network.decode(cache, ids[:, 150:199])
        logits.append(network.prefill(cache, ids[:, 199:], 64))
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].std()


def test_decode(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    small = "--preset tiny --lengths 256 --rounds 1 --tokens 4 --threads 1 --parts decode"
    text = against_transformers.main([*small.split(), "--write", str(page)])
    assert text in page.read_text()
    assert list(tmp_path.glob("page-*.png"))
    for part in ("| 256 | transformers | ", "| 256 | ours, defaults | ", "| 256 | ours, fastest | ", "filled / read"):
        assert part in text


@pytest.mark.long  # four processes that load PyTorch and transformers
def test_prefill_and_growth():
    small = "--preset tiny --threads 1 --parts prefill growth --prefill 256 --growth 128 256"
    text = against_transformers.main(small.split())
    for part in ("Prefill of 256 tokens", "times less memory", "ms per token, 128 tokens", "times more"):
        assert part in text


@pytest.mark.long  # ten processes
def test_start_up_includes_imports():
    text = against_transformers.main(["--preset", "tiny", "--threads", "1", "--parts", "start-up"])
    seconds = [
        float(line.split("|")[3].split()[0]) for line in text.splitlines() if line.startswith(("| ours", "| tr"))
    ]
    assert len(seconds) == 3 and min(seconds) > 0.2  # importing torch alone takes as long


def test_lengths_below_the_decoded_tokens_are_refused():
    with pytest.raises(FiftyfoldError, match="20 tokens are fewer than the 96"):
        against_transformers.main(["--preset", "tiny", "--lengths", "20", "--parts", "decode"])
