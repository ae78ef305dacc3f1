"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.entry_ranges import EntryRanges
from kernels.index_topk import select_entries
from kernels.indexer_kl import indexer_kl, triton
from kernels.sparse_attention import StoredMass, deterministic_gradients
from kernels.triton_support.platform import checked_selections

B = 2


def inputs(tokens, heads, dims, entries):
    """Return index queries, keys and head weights, and causal ranges, of which the last few begin later."""
    end = (torch.arange(tokens) * (entries + 1) // tokens).expand(B, -1).clone()
    first = torch.where(torch.arange(tokens) >= tokens - 3, end[:, :1] + entries // 3, 0).expand(B, -1)
    shapes = (B, tokens, heads, dims), (B, entries, dims), (B, tokens, heads)
    return [torch.randn(shape) * 0.5 for shape in shapes], EntryRanges(first.minimum(end), end)


def attention_mass(permitted):
    """Return a random mass, also of entries that are not permitted; some of it and all of one row's are tiny."""
    mass = torch.rand(permitted.shape) * 10.0 ** torch.randint(-9, 1, permitted.shape)
    mass[:, -2] *= 1e-25
    return mass


def run(backend, given, mass, visible, chosen=None):
    leaves = [x.clone().requires_grad_() for x in given]
    loss = indexer_kl(*leaves, StoredMass(mass), visible, chosen, backend)
    loss.mul(3.0).backward()
    return [loss.detach(), *(x.grad for x in leaves)]


def compare(*given):
    for x, y in zip(run("triton", *given), run("reference", *given), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def select(tokens, entries, k):
    chosen = torch.rand(B, tokens, entries).argsort(-1)[..., :k]
    chosen = chosen.masked_fill(torch.rand(chosen.shape) < 0.3, -1)
    chosen[:, 1] = -1
    return chosen


@pytest.mark.parametrize("scores", [1, 1 << 25])
@pytest.mark.parametrize(("tokens", "heads", "dims", "entries"), [(9, 3, 20, 5), (7, 16, 16, 37), (4, 1, 16, 16)])
def test_all_visible_entries(tokens, heads, dims, entries, scores, monkeypatch):
    monkeypatch.setattr(triton, "_MAX_SCORES", scores)
    given, visible = inputs(tokens, heads, dims, entries)
    compare(given, attention_mass(visible.mask(entries)), visible)


def test_keys_whose_queries_are_split_among_programs(monkeypatch):
    monkeypatch.setattr(triton, "_MIN_QUERIES_PER_SPLIT", 2)
    given, visible = inputs(11, 2, 16, 20)
    compare(given, attention_mass(visible.mask(20)), visible)


@pytest.mark.parametrize("scores", [1, 1 << 25])
def test_chosen_entries_with_and_without_a_fixed_order(scores, monkeypatch):
    monkeypatch.setattr(triton, "_MAX_SCORES", scores)
    given, visible = inputs(7, 3, 20, 37)
    chosen = select(7, 37, 18)
    mass = attention_mass(chosen >= 0)
    compare(given, mass, visible, chosen)
    with deterministic_gradients():
        compare(given, mass, visible, chosen)


def test_without_gradients_only_the_loss_is_computed():
    given, visible = inputs(5, 2, 16, 20)
    mass = StoredMass(attention_mass(visible.mask(20)))
    found, expected = (indexer_kl(*given, mass, visible, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not found.requires_grad


def test_no_permitted_entry_at_all():
    given, _ = inputs(3, 2, 16, 4)
    nothing = EntryRanges(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))
    for chosen in (None, torch.full((B, 3, 2), -1)):
        mass = torch.rand(B, 3, 4 if chosen is None else 2)
        assert not any(x.any() for x in run("triton", given, mass, nothing, chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [1, 1 << 26])
def test_entries_of_whole_sequences_are_selected_within_their_ranges(workspace, dtype, monkeypatch):
    """Scores are small integers: sums are exact, and many are equal."""
    monkeypatch.setattr("kernels.index_topk.triton._MAX_WORKSPACE_SCORES", workspace)
    _, visible = inputs(9, 3, 16, 150)
    given = [torch.randint(-2, 3, shape).float() for shape in ((B, 9, 3, 16), (B, 150, 16), (B, 9, 3))]
    for ranges in (visible, EntryRanges(visible.first[:1], visible.end[:1])):
        found, expected = (select_entries(*given, ranges, 8, dtype, backend) for backend in ("triton", "reference"))
        assert torch.equal(found, expected) and (found == -1).any()


def test_unsupported_inputs_are_refused_with_the_supported_set():
    given, visible = inputs(2, 65, 16, 4)
    mass = attention_mass(visible.mask(4))
    with pytest.raises(ValueError, match=r"supports heads up to 64; found 65$"):
        run("triton", given, mass, visible)
    given, visible = inputs(2, 1, 129, 4)
    with pytest.raises(ValueError, match=r"supports dims up to 128; found 129$"):
        run("triton", given, mass, visible)
    given, visible = inputs(2, 1, 16, 4)
    chosen = torch.tensor([[[0], [4]]]).expand(B, -1, -1)
    with checked_selections(), pytest.raises(IndexError, match=r"selection \[0, 1, 0\] is 4, of 4 entries"):
        run("triton", given, torch.ones(B, 2, 1), visible, chosen)
