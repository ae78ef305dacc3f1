"""Adding a mixer takes one file and one line of registration: an exponential moving average defined in this file."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import checkpoint
from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.cache.parts import RecurrentPart
from model.config import ModelConfig
from model.costs import cache_bytes, count_parameters, decode_work, fixed_state_bytes
from model.errors import CacheError, ConfigError
from model.forward.execution import Execution
from model.layers.linear import Linear
from model.mixers import MIXERS
from model.mixers.base import Mixer, require
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer
from model.work import Work
from tests.model.networks import SMALL


class MovingAverage(Mixer):
    """Exponential moving average of projected tokens with a learned decay rate per channel."""

    name = "ema"
    options = {"channels": 24}  # noqa: RUF012

    @classmethod
    def channels(cls, config):
        return config.mixer_options[cls.name]["channels"]

    @classmethod
    def check(cls, config):
        channels = cls.channels(config)
        require(channels >= 1, f"must be at least 1, found {channels}", "mixer_options.ema.channels")

    @classmethod
    def cache_parts(cls, config):
        return {"state": RecurrentPart((cls.channels(config),))}

    @classmethod
    def work(cls, config, tokens):
        return [Work("moving averages", "linear", "bf16", 4.0 * config.hidden_size * cls.channels(config))]

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.wi = Linear(config.hidden_size, self.channels(config))
        self.wo = Linear(self.channels(config), config.hidden_size)
        self.decay = nn.Parameter(torch.zeros(self.channels(config)))

    def init_weights(self, std):
        self.decay.normal_(std=1.0)

    def zero_output(self):
        self.wo.weight.zero_()

    def project(self, x, rotation, context, cached):
        return self.wi(x)

    def mix(self, projected, context, cache):
        state = projected.new_zeros(projected.shape[0], projected.shape[2]) if cache is None else cache.state.read()
        # [B, S]: whether a token begins one of the documents packed into a row.
        begins = None if context.documents is None else context.documents.positions == 0
        keep = self.decay.sigmoid()
        states = []
        for i, token in enumerate(projected.unbind(1)):
            if begins is not None:
                state = state.masked_fill(begins[:, i, None], 0.0)
            state = keep * state + (1 - keep) * token
            states.append(state)
        if cache is not None:
            cache.state.append(state)
        return torch.stack(states, dim=1)

    def output(self, mixed, rotation):
        return self.wo(mixed)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MIXERS, "ema", MovingAverage)


def build(**overrides):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**SMALL, "layers": ("ema", "csa", "ema"), "mtp_layers": 1, **overrides}))


def random_ids(*shape):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def test_it_trains():
    model = build().train()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(), model.split_sizes())
    ids, losses = random_ids(2, 40), []
    for _ in range(3):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        assert model.layers[0].attn.decay.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@torch.no_grad()
def test_packed_documents_do_not_see_one_another():
    model = build(mtp_layers=0).eval()
    ids = random_ids(1, 30)
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    packed = model(ids, positions=positions)
    for part in (slice(0, 13), slice(13, 30)):
        torch.testing.assert_close(packed[:, part], model(ids[:, part]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cached_pieces_equal_the_full_pass():
    model = build().eval()
    ids = random_ids(2, 40)
    expected = model(ids)
    cache = Cache(model.config, 2, 40)
    found = torch.cat([model(piece, cache) for piece in ids.split([17, 1, 9, 13], dim=1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_cache_forks_joins_splits_and_is_saved(tmp_path):
    model = build().eval()
    ids = random_ids(1, 41)
    cache = Cache(model.config, 1, 64)
    model(ids[:, :40], cache)
    expected = model(ids[:, 40:], cache.fork())
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = Cache(model.config, 1, 64)
    restore_cache(restored, tmp_path / "cache.safetensors")
    other = Cache(model.config, 1, 64, pool=cache.pool)
    cache.pool.grow(2)
    model(random_ids(1, 13), other)
    together = Cache.join([cache, other])
    # Products of two rows may be summed in another order.
    found = model(torch.cat((ids[:, 40:], ids[:, :1])), together.fork())[:1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for again in (restored, together.split()[0]):
        assert torch.equal(model(ids[:, 40:], again), expected)


def test_a_cache_made_in_inference_mode_goes_on_outside():
    model = build().eval()
    ids = random_ids(1, 20)
    with torch.inference_mode():
        cache = Cache(model.config, 1, 20)
        model(ids[:, :12], cache)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 12:], cache), model(ids)[:, 12:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_goes_back_only_to_where_a_state_was_kept():
    model = build(layers=("ema",), mtp_layers=0).eval()
    ids = random_ids(1, 30)
    cache = Cache(model.config, 1, 64, rewind=2)
    for piece in ids[:, :20].split([10, 8, 1, 1], dim=1):
        model(piece, cache)
    with pytest.raises(CacheError, match="cannot truncate from 20 to 17 tokens: the recurrent states can resume at 18"):
        cache.truncate(17)
    cache.truncate(18)
    whole = Cache(model.config, 1, 64)
    expected = model(ids, whole)[:, 18:]
    torch.testing.assert_close(model(ids[:, 18:], cache), expected, rtol=1e-4, atol=1e-5)
    cache.truncate(0)
    torch.testing.assert_close(model(ids, cache)[:, 18:], expected, rtol=1e-4, atol=1e-5)


def test_its_costs_and_options_are_its_own(tmp_path):
    model = build(mixer_options={"ema": {"channels": 32}})
    config = model.config
    assert fixed_state_bytes(config)["state"] == 2 * (32 * 4 + 8)
    cache = Cache(config, 3, config.page_tokens)
    assert cache.nbytes("state") == 3 * fixed_state_bytes(config)["state"]
    assert cache.nbytes() == 3 * cache_bytes(config, config.page_tokens)
    work = {part.part: part.flops for part in decode_work(config, 9)}
    assert work["moving averages"] == 2 * 4.0 * config.hidden_size * 32
    own = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(("layers.0.attn.", "layers.2.attn."))
    )
    assert count_parameters(model).components["attention"][0] > own
    assert own == 2 * (2 * 32 * config.hidden_size + 32)
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == config
    with pytest.raises(ConfigError, match=r"mixer_options\.ema\.chanels: unknown option; there are channels"):
        build(mixer_options={"ema": {"chanels": 32}})
    with pytest.raises(ConfigError, match=r"mixer_options\.ema\.channels: must be at least 1, found 0"):
        build(mixer_options={"ema": {"channels": 0}})
    with pytest.raises(ConfigError, match="layers of 'ema' have no batch-invariant mode"):
        model.execution = Execution("batch-invariant")
