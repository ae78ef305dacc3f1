import pytest
import torch
from networks import EXACT, build

from model.errors import CacheError
from model.generation import generate


def test_every_token_is_the_likeliest_after_those_before_it():
    model = build(**EXACT).eval()
    prompt = torch.randint(0, 50, (2, 9))
    found = generate(model, prompt, 30)
    assert found.shape == (2, 39) and torch.equal(found[:, :9], prompt)
    assert torch.equal(model(found[:, :-1])[:, 8:].argmax(-1), found[:, 9:])


def test_it_stops_when_every_sequence_has_ended():
    model = build().eval()
    prompt = torch.randint(0, 50, (3, 9))
    whole = generate(model, prompt, 30)
    end = int(whole[0, 9 + 4])
    found = generate(model, prompt, 30, eos_id=end)
    assert found.shape[1] <= whole.shape[1]
    for row, full in zip(found[:, 9:].tolist(), whole[:, 9:].tolist()):
        stop = row.index(end) if end in row else len(row)
        assert row[:stop] == full[:stop] and set(row[stop:]) <= {end}


def test_more_tokens_than_positions_are_refused():
    model = build(max_positions=32).eval()
    prompt = torch.zeros(1, 20, dtype=torch.int64)
    assert generate(model, prompt, 13).shape == (1, 33)
    with pytest.raises(CacheError, match="33 tokens exceed the model's max_positions of 32"):
        generate(model, prompt, 14)
