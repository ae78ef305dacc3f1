import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.entry_ranges import EntryRanges
from kernels.index_topk import select_entries
from kernels.indexer_kl import backend_for, eager, indexer_kl
from kernels.sparse_attention import StoredMass

B, S, H, C, T = 2, 12, 3, 8, 9


def ranges(tokens, entries):
    end = torch.arange(tokens) * (entries + 1) // tokens
    first = torch.where(torch.arange(tokens) < tokens - 2, 0, end[0] + entries // 2)
    return EntryRanges(first.minimum(end).unsqueeze(0), end.unsqueeze(0))


def select(tokens, entries, k):
    """Return distinct entries in random order, with random empty slots; the second query selects none."""
    chosen = torch.rand(B, tokens, entries).argsort(-1)[..., :k]
    chosen = chosen.masked_fill(torch.rand(chosen.shape) < 0.3, -1)
    chosen[:, 1] = -1
    return chosen


def inputs(tokens=S, entries=T, k=None):
    """Return the tensors, a mass (also of entries that are not permitted), the ranges, and the chosen entries."""
    given = [torch.randn(shape) for shape in ((B, tokens, H, C), (B, entries, C), (B, tokens, H))]
    visible, chosen = ranges(tokens, entries), None if k is None else select(tokens, entries, k)
    shape = (B, tokens, entries) if chosen is None else chosen.shape
    mass = torch.rand(shape) * 10.0 ** torch.randint(-8, 1, shape)
    mass[:, -1] *= 1e-24
    return given, mass, visible, chosen


def run(backend, given, mass, visible, chosen, autocast=False):
    leaves = [x.clone().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = indexer_kl(*leaves, StoredMass(mass), visible, chosen, backend)
    loss.mul(2.0).backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_loss_follows_its_definition(backend, k):
    """Compute it query by query in float64, from the permitted entries alone."""
    given, mass, visible, chosen = inputs(k=k)
    leaves = [x.double().requires_grad_() for x in given]
    query, keys, weights = leaves
    terms = []
    for b, s in torch.cartesian_prod(torch.arange(B), torch.arange(S)).tolist():
        slots = torch.arange(int(visible.first[0, s]), int(visible.end[0, s]))
        entries = slots
        if chosen is not None:
            slots = (chosen[b, s] >= 0).nonzero().flatten()
            entries = chosen[b, s, slots]
        if len(entries):
            scores = (query[b, s] @ keys[b, entries].T).relu().mul(weights[b, s].unsqueeze(-1)).sum(0)
            teacher = mass[b, s, slots].double()
            teacher = teacher / teacher.sum().clamp(min=1e-20)
            terms.append((torch.xlogy(teacher, teacher) - teacher * scores.log_softmax(0)).sum())
    expected = torch.stack(terms).mean()
    expected.mul(2.0).backward()
    found = run(backend, given, mass, visible, chosen)
    for x, y in zip(found, (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scores", [1, 50, 1 << 22])
@pytest.mark.parametrize(("entries", "k"), [(T, None), (T, 4), (60, 2)])  # all keys scored, and chosen ones gathered
def test_blocks_of_queries_change_neither_the_loss_nor_its_gradients(entries, k, scores, autocast, monkeypatch):
    monkeypatch.setattr(eager, "_MAX_SCORES", scores)
    given = inputs(40, entries, k)
    for found, expected in zip(run("eager", *given, autocast), run("reference", *given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("k", [None, 4])
def test_queries_without_an_entry_have_no_loss(backend, k):
    given, mass, _, chosen = inputs(k=k)
    nothing = EntryRanges(torch.full((1, S), 3), torch.full((1, S), 3))
    chosen = None if chosen is None else torch.full_like(chosen, -1)
    assert not any(x.any() for x in run(backend, given, mass, nothing, chosen))
    empty = [given[0], given[1][:, :0], given[2]]
    nothing = EntryRanges(torch.zeros(1, S, dtype=torch.int64), torch.zeros(1, S, dtype=torch.int64))
    assert not run(backend, empty, mass[..., :0], nothing, None)[0]


def test_the_loss_has_a_graph_only_if_a_backward_pass_can_follow():
    given, mass, visible, chosen = inputs()
    assert not indexer_kl(*given, StoredMass(mass), visible, chosen).requires_grad
    leaves = [x.requires_grad_() for x in given]
    with torch.no_grad():
        assert not indexer_kl(*leaves, StoredMass(mass), visible, chosen).requires_grad
    assert indexer_kl(*leaves, StoredMass(mass), visible, chosen).requires_grad
    assert backend_for(given[0]) == "eager"


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.most = max(self.most, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), 0)
        return result


class MassByBlocks:
    def of(self, queries):
        return torch.ones(B, queries.stop - queries.start, 400)


def test_nothing_of_queries_times_entries_exists_at_once(monkeypatch):
    monkeypatch.setattr(eager, "_MAX_SCORES", 1 << 12)
    monkeypatch.setattr("kernels.index_topk.eager._MAX_BLOCK_SCORES", 1 << 12)
    monkeypatch.setattr("kernels.index_scores.eager._MAX_PRODUCTS", 1 << 12)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((B, 400, H, C), (B, 400, C), (B, 400, H))]
    visible = EntryRanges(torch.zeros(1, 400, dtype=torch.int64), torch.full((1, 400), 400))
    with LargestTensor() as largest:
        indexer_kl(*leaves, MassByBlocks(), visible).backward()
        select_entries(*leaves, visible, 4)
    assert largest.most < B * 400 * 400 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [1, 100, 1 << 22])
def test_the_selection_within_whole_sequences_is_the_best_of_the_visible_entries(scores, dtype, monkeypatch):
    monkeypatch.setattr("kernels.index_topk.eager._MAX_BLOCK_SCORES", scores)
    given, _, visible, _ = inputs()
    query, keys, weights = given
    scored = (torch.einsum("bshc,btc->bsht", query, keys).relu() * weights.unsqueeze(-1)).sum(2).to(dtype).float()
    order = scored.masked_fill(~visible.mask(T), float("-inf")).sort(dim=-1, descending=True, stable=True)
    expected = order.indices.masked_fill(order.values == float("-inf"), -1)
    for backend in ("reference", "eager"):
        assert torch.equal(select_entries(*given, visible, 4, dtype, backend), expected[..., :4])
        assert torch.equal(select_entries(*given, visible, T + 5, dtype, backend), expected)
    assert select_entries(query, keys[:, :0], weights, visible, 4).shape == (B, S, 0)
