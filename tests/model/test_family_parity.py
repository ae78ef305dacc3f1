"""Parity of the other families' networks with transformers.

Configurations and measurements come from ``benchmarks/family_parity.py``. By default a subset of lengths and cuts runs;
the marker ``long`` selects all.
"""

import pytest
import transformers

from benchmarks import family_parity
from benchmarks.lib import parity as comparison
from model.errors import FiftyfoldError

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
LENGTHS = [1, 2, 3, 5, 8, 17, 64, 129, comparison.TOKENS]
CUTS = (1, 4, 8, 15, 20)


@pytest.mark.parametrize(("model_type", "name"), family_parity.ALL)
def test_logits_and_gradients_agree(model_type, name):
    p = family_parity.pair(model_type, name)
    assert 0.5 < p.logits.std() < 2
    assert family_parity.selection_margin(p) > family_parity.MARGIN
    assert comparison.full_forward(p, LENGTHS) < comparison.TOLERANCE
    assert comparison.decode(p, 25) < comparison.TOLERANCE
    assert comparison.chunked(p, 21, CUTS) < comparison.TOLERANCE
    worst, where, count = comparison.gradients(p, 150)
    assert worst < comparison.GRADIENT_TOLERANCE, where
    assert count > 15


def test_near_ties_are_refused(monkeypatch):
    monkeypatch.setattr(family_parity, "pair", lambda *names: None)
    monkeypatch.setattr(family_parity, "selection_margin", lambda p: family_parity.MARGIN)
    monkeypatch.setattr(family_parity, "comparisons", lambda p: {})
    with pytest.raises(
        FiftyfoldError, match=r"^deepseek_v32: dense: selected and unselected scores differ by only 1\.0e-05; choose"
    ):
        family_parity.measure("deepseek_v32", "dense")


@pytest.mark.long
@pytest.mark.parametrize(("model_type", "name"), family_parity.ALL)
def test_every_length_every_cut_every_gradient(model_type, name):
    found = family_parity.measure(model_type, name)
    assert max(found[key] for key in ("full", "decode", "chunked")) < comparison.TOLERANCE
    assert found["gradient"] < comparison.GRADIENT_TOLERANCE
