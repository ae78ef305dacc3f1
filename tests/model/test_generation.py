import pytest
import torch

from model.cache import Cache
from model.errors import CacheError
from model.generation import generate, prefill
from tests.model.networks import EXACT, build


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


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), {}, r"input_ids: expected integers \[B, S\] .* found torch.int64 \[5\]"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, r"with at least one token, found torch.int64 \[1, 0\]"),
        (torch.zeros(1, 5), {}, r"found torch.float32 \[1, 5\]"),
        (torch.tensor([[3, 50]]), {}, "input_ids: 3 to 50 do not all lie in a vocabulary of 50"),
        (torch.tensor([[3, -1]]), {}, "input_ids: -1 to 3 do not"),
        (torch.tensor([[3]]), {"chunk": 0}, "chunk: expected at least 1 token, found 0"),
    ],
)
def test_ids_that_cannot_be_read_are_named_and_change_nothing(ids, options, message):
    model = build().eval()
    cache = Cache(model.config, 1, 32)
    with pytest.raises(ValueError, match=message):
        prefill(model, cache, ids, **options)
    assert cache.lengths == [0] and prefill(model, cache, torch.tensor([[3]])).isfinite().all()
    if not options:
        with pytest.raises(ValueError, match=message):
            generate(model, ids, 3)


def test_a_negative_number_of_tokens_is_refused():
    model = build().eval()
    prompt = torch.tensor([[3]])
    assert torch.equal(generate(model, prompt, 0), prompt)
    with pytest.raises(ValueError, match="max_new_tokens: expected 0 or more, found -1"):
        generate(model, prompt, -1)
