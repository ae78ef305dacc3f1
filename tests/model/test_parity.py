"""Parity with transformers' independent implementation of the published network.

Configurations and measurements come from ``benchmarks/parity.py``. By default a subset runs, about a minute in total;
the marker ``long`` selects all. Equal index scores are resolved by the library's top-k in transformers and by the lower
entry here, so the tests only use seeds without near ties.
"""

import pytest
import torch
import transformers

from benchmarks import parity
from benchmarks.lib import parity as comparison
from model.errors import FiftyfoldError
from model.generation import generate

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 17, 129, comparison.TOKENS]
CUTS = (1, 3, 4, 6, 8, 13, 16, 20)  # at block boundaries of both ratios, within blocks, and one token from the end
DECODED_WHOLE = ("top-k 8", "schedule as in Flash")


@pytest.mark.parametrize("name", parity.CONFIGURATIONS)
def test_logits_and_gradients_agree(name):
    p = parity.pair(name)
    assert 0.5 < p.logits.std() < 2
    assert parity.selection_margin(p) > parity.MARGIN
    assert comparison.full_forward(p, LENGTHS) < comparison.TOLERANCE
    assert comparison.decode(p, comparison.TOKENS if name in DECODED_WHOLE else 25) < comparison.TOLERANCE
    assert comparison.chunked(p, 21, CUTS) < comparison.TOLERANCE
    worst, where, count = comparison.gradients(p, 150)
    assert worst < comparison.GRADIENT_TOLERANCE, where
    assert count > 50


def test_two_sequences_at_once():
    p = parity.pair("schedule as in Pro", batch=2)
    assert comparison.full_forward(p, [40, 133]) < comparison.TOLERANCE
    assert comparison.chunked(p, 133, range(16, 133, 29)) < comparison.TOLERANCE


@pytest.mark.parametrize("name", ["top-k 8", "schedule as in Flash", "YaRN, factor 16 over 64"])
def test_greedy_decoding_gives_the_same_tokens(name):
    p = parity.pair(name)
    prompt = p.ids[:, :37]
    expected = p.oracle.generate(prompt, max_new_tokens=60, do_sample=False, use_cache=True)
    found = generate(p.ours, prompt, 60)
    assert torch.equal(found, expected)
    assert len(found[0, 37:].unique()) > 5
    # With an end token that occurs in the sequence, both stop there.
    end = int(found[0, 37 + 12])
    expected = p.oracle.generate(prompt, max_new_tokens=60, do_sample=False, eos_token_id=end, pad_token_id=end)
    assert torch.equal(generate(p.ours, prompt, 60, eos_id=end), expected)
    assert expected.shape[1] <= 37 + 13


def test_near_ties_are_refused(monkeypatch):
    monkeypatch.setattr(parity, "pair", lambda name: None)
    monkeypatch.setattr(parity, "selection_margin", lambda p: parity.MARGIN)
    monkeypatch.setattr(parity, "comparisons", lambda p: {})
    with pytest.raises(
        FiftyfoldError, match=r"^top-k 2: selected and unselected scores differ by only 1\.0e-04; choose"
    ):
        parity.measure("top-k 2")


@pytest.mark.long
@pytest.mark.parametrize("name", parity.CONFIGURATIONS)
def test_every_length_every_cut_every_gradient(name):
    found = parity.measure(name)
    assert max(found[key] for key in ("full", "decode", "chunked")) < comparison.TOLERANCE
    assert found["gradient"] < comparison.GRADIENT_TOLERANCE
