"""After warming up, reading and decoding meet no form of code that is not there."""

import random

import pytest
import torch
from networks import build

from model import execution
from model.cache import Cache
from model.cache_filling import fill_random
from model.errors import CacheError
from model.execution import Execution
from model.warm_up import warm_up

LONG, CHUNK = 6000, 100
LAYERS = {"hybrid": ("sliding", "csa", "hca"), "gqa": ("gqa",), "no sliding": ("csa", "hca")}


@pytest.fixture()
def forms(monkeypatch):
    """How many forms of code were asked for; none is really compiled."""
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    execution._code.cache_clear()
    yield lambda: execution._code.cache_info().currsize
    execution._code.cache_clear()


def read(model, before, tokens):
    cache = Cache(model.config, 1, before + tokens)
    if before:
        fill_random(cache, before)
    with torch.inference_mode():
        model(torch.zeros(1, tokens, dtype=torch.int64), cache, last_only=bool(before))


@pytest.mark.parametrize(("ratios", "heads"), [((4, 32), 4), ((6, 24), 4), ((4, 32), 6)])
@pytest.mark.parametrize("name", LAYERS)
def test_no_request_meets_new_code(name, ratios, heads, forms):
    sizes = {"csa_ratio": ratios[0], "hca_ratio": ratios[1], "num_heads": heads, "max_positions": 8 * LONG}
    model = build(layers=LAYERS[name], num_hash_layers=0, **sizes)
    model.execution = Execution("compiled")
    warm_up(model, LONG, CHUNK)
    there = forms()
    assert there
    draw = random.Random(0)
    lengths = [0, 1, *(int(2 ** draw.uniform(0, 12.5)) for _ in range(60))]
    for before in lengths:
        for tokens in (1, draw.randint(1, CHUNK)):
            read(model, min(before, LONG - tokens), tokens)
    assert forms() == there
    read(model, 7 * LONG, 1)
    assert forms() > there or name == "gqa"


def test_there_is_nothing_to_do_in_other_modes(forms):
    model = build()
    for mode in ("eager", "batch-invariant"):
        model.execution = Execution(mode)
        warm_up(model, model.config.max_positions)
    assert not forms()


def test_more_tokens_than_the_model_allows_are_refused(forms):
    model = build()
    model.execution = Execution("compiled")
    with pytest.raises(CacheError, match="exceed the model's max_positions"):
        warm_up(model, model.config.max_positions + 1)
