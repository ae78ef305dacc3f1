"""The short convolution over the keys of grouped-query attention."""

import pytest
import torch

from model.cache import Cache
from model.cache.pages import PagePool
from model.config import ModelConfig
from model.costs import costs_of, fixed_state_bytes
from model.errors import ConfigError
from model.forward.execution import Execution
from tests.model.networks import EXACT, SMALL, build, random_ids, stored_rows


def options(kernel=3):
    return {**SMALL["mixer_options"], "gqa": {"conv_kernel": kernel}}


def network(layers=("gqa", "csa", "gqa"), **overrides):
    return build(layers=layers, mixer_options=options(), **{**EXACT, **overrides})


@pytest.mark.parametrize("pieces", [[1] * 60, [60], [2, 1, 30, 1, 26]])
@torch.no_grad()
def test_cached_pieces_equal_the_full_pass(pieces):
    model, ids = network(), random_ids(2, 60)
    cache = Cache(model.config, 2, 60)
    found = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_a_key_depends_on_the_tokens_before_its_own():
    first = random_ids(1, 20)
    second = first.clone()
    second[0, 4] = (second[0, 4] + 1) % SMALL["vocab_size"]

    def changed_rows(model):
        rows = []
        for ids in (first, second):
            cache = Cache(model.config, 1, 20)
            model(ids, cache)
            rows.append(stored_rows(cache.layers[0].entries)[0])
        return (rows[0] != rows[1]).any(dim=-1).nonzero().flatten().tolist()

    assert changed_rows(network(layers=("gqa",))) == [4, 5, 6]
    assert changed_rows(build(layers=("gqa",), **EXACT)) == [4]


@torch.no_grad()
def test_documents_of_a_row_do_not_mix():
    model, ids = network(layers=("gqa",)), random_ids(1, 40)
    packed = model(ids, positions=torch.cat((torch.arange(17), torch.arange(23))).unsqueeze(0))
    torch.testing.assert_close(packed[:, 17:], model(ids[:, 17:]), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_batch_invariant_bits_do_not_depend_on_the_batch():
    model = network()
    model.execution = Execution("batch-invariant")
    ids, pool = random_ids(3, 30), PagePool(model.config, 3 * 2)
    caches = [Cache(model.config, 1, 30, pool=pool) for _ in range(3)]
    alone = []
    for row, (length, cache) in enumerate(zip((5, 1, 17), caches)):
        model(ids[row : row + 1, :length], cache)
        alone.append(model(ids[row : row + 1, length : length + 1], cache.fork()))
    together = Cache.join(caches)
    new = torch.stack([ids[row, n : n + 1] for row, n in enumerate((5, 1, 17))])
    assert torch.equal(model(new, together), torch.cat(alone))


def test_the_convolution_is_counted_in_cache_and_work():
    plain = ModelConfig(**{**SMALL, "layers": ("gqa", "gqa"), **EXACT})
    config = plain.replace(mixer_options=options())
    kv = config.num_kv_heads * config.head_dim
    assert fixed_state_bytes(config) == {"state": 2 * (2 * kv * 4 + 8)}
    assert costs_of(config).flops(100) - costs_of(plain).flops(100) == 2 * 2 * 3 * kv


@pytest.mark.parametrize("kernel", [1, 0, True, "4", 2.0])
def test_a_bad_kernel_is_named(kernel):
    with pytest.raises(ConfigError, match=r"^mixer_options\.gqa\.conv_kernel: expected a whole number of at least 2"):
        ModelConfig(**{**SMALL, "layers": ("gqa",), "mixer_options": options(kernel)})
