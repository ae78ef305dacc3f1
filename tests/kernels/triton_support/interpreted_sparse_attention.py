"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.entry_ranges import EntryRanges
from kernels.sparse_attention import deterministic_gradients, sparse_attention, triton
from kernels.triton_support.platform import checked_selections
from kernels.triton_support.tiles import Tile
from tests.kernels.backend_testing import poison_new_tensors

B, C, WINDOW = 2, 32, 9


def inputs(tokens, heads, entries, past=0):
    shapes = (B, tokens, heads, C), (B, past + tokens, C), (B, entries, C)
    query, window_kv, pool = (torch.randn(shape) for shape in shapes)
    return query, window_kv, pool, torch.randn(heads)


def run(backend, given, reach=None, ranges=None, chosen=None, window=WINDOW):
    leaves = [None if x is None else x.clone().requires_grad_() for x in given]
    query, window_kv, entries, sink = leaves
    out, mass = sparse_attention(query, window_kv, entries, ranges, sink, window, reach, chosen=chosen, backend=backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    found = [out.detach(), *(x.grad for x in leaves if x is not None)]
    return found if mass is None else [*found, mass.of(), mass.of(slice(1, 3))]


def compare(given, **options):
    expected = run("reference", given, **options)
    for gradients in (False, True):
        if gradients:
            with deterministic_gradients():
                found = run("triton", given, **options)
        else:
            found = run("triton", given, **options)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def select(tokens, entries, k):
    """Return distinct entries in random order, with random empty slots; the first query selects none."""
    chosen = torch.rand(B, tokens, entries).argsort(-1)[..., :k]
    chosen = chosen.masked_fill(torch.rand(chosen.shape) < 0.3, -1)
    chosen[:, 0] = -1
    return chosen


@pytest.mark.parametrize(("tokens", "heads", "past"), [(1, 3, 8), (5, 20, 3)])
def test_chosen_entries(tokens, heads, past):
    compare(inputs(tokens, heads, 21, past), chosen=select(tokens, 21, 18))


def random_ranges(rows, tokens, entries):
    """Return ranges of random lengths, some of them empty."""
    ends = torch.randint(0, entries + 1, (rows, tokens, 2)).sort(-1).values
    ends[:, :2, 1] = ends[:, :2, 0]
    return EntryRanges(ends[..., 0], ends[..., 1])


@pytest.mark.parametrize("rows", [1, B])
def test_ranges_of_entries_with_several_queries_in_a_program(rows):
    reach = torch.tensor([[1, 2, 3, 1, 2, 9, 9]]).expand(B, -1)
    compare(inputs(7, 3, 53), ranges=random_ranges(rows, 7, 53), reach=reach)


def test_tiles_before_and_after_all_ranges_are_skipped(monkeypatch):
    """Entries that no query of a program sees are not read, and have neither a mass nor a part of a gradient."""
    query, window_kv, pool, sink = inputs(5, 16, 70)
    ranges = EntryRanges(torch.full((1, 5), 37), torch.full((1, 5), 41))
    expected = run("reference", (query, window_kv, pool, sink), ranges=ranges)
    pool = pool.clone()
    pool[:, :32], pool[:, 48:] = float("nan"), float("nan")
    poison_new_tensors(monkeypatch)
    found = run("triton", (query, window_kv, pool, sink), ranges=ranges)
    with deterministic_gradients():
        again = run("triton", (query, window_kv, pool, sink), ranges=ranges)
    for x, y, z in zip(found, again, expected, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


def test_a_window_alone():
    query, window_kv, _, sink = inputs(17, 2, 0)
    compare((query, window_kv, None, sink))


def test_entries_alone_without_a_sink():
    query, _, pool, _ = inputs(3, 2, 20)
    ranges = EntryRanges(torch.tensor([[0, 17, 3]]), torch.tensor([[18, 18, 20]]))
    compare((query, None, pool, None), ranges=ranges, window=0)


def test_a_selection_without_any_entry_equals_a_window_alone():
    given = inputs(4, 2, 5)
    chosen = torch.full((B, 4, 3), -1)
    found = run("triton", given, chosen=chosen)
    alone = run("triton", (given[0], given[1], None, given[3]))
    for x, y in zip((*found[:3], found[4]), alone, strict=True):
        torch.testing.assert_close(x, y)
    assert not found[3].any() and not found[5].any()


@pytest.mark.parametrize("passes", [1, 2])
def test_deterministic_gradients_in_several_pieces(passes, monkeypatch):
    monkeypatch.setattr(triton, "_MAX_PART_BYTES", 1)
    monkeypatch.setitem(
        triton.BACKWARD_TILES, "interpreter", (Tile(4, 1, {"rows": 16, "BLOCK_N": 16, "passes": passes}),)
    )
    given, chosen = inputs(3, 2, 9), select(3, 9, 5)
    with deterministic_gradients():
        found = run("triton", given, chosen=chosen)
    for x, y in zip(found, run("reference", given, chosen=chosen), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_bf16_inputs():
    given = [x.bfloat16() for x in inputs(3, 2, 20)]
    chosen = select(3, 20, 18)
    found = run("triton", given, chosen=chosen)
    expected = run("reference", [x.float() for x in given], chosen=chosen)
    assert found[0].dtype == torch.bfloat16
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=0.03, atol=0.03)


def test_selections_out_of_range_are_caught_in_debug_mode():
    given, chosen = inputs(2, 2, 5), torch.zeros(B, 2, 3, dtype=torch.int64)
    for wrong in (5, -2):
        chosen[1, 0, 2] = wrong
        with checked_selections(), pytest.raises(IndexError, match=rf"selection \[1, 0, 2\] is {wrong}, of 5 entries"):
            run("triton", given, chosen=chosen)


def test_unsupported_inputs_are_refused_with_the_supported_set():
    query, window_kv, pool, sink = inputs(2, 2, 5)
    with pytest.raises(ValueError, match=r"supports head dims 32, 64, 128, 256, 512; found 24$"):
        run("triton", (torch.zeros(B, 2, 2, 24), torch.zeros(B, 2, 24), None, sink))
    with pytest.raises(ValueError, match=r"supports dtypes bfloat16, float16, float32; found float64$"):
        run("triton", [x.double() for x in (query, window_kv)] + [None, sink])
    mask = torch.ones(B, 2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="pass gathered ones as chosen"):
        run("triton", (query, window_kv, pool.unsqueeze(1).expand(-1, 2, -1, -1), sink), ranges=mask)
    with pytest.raises(ValueError, match="supports ranges of entries; pass those of a mask as chosen"):
        run("triton", (query, window_kv, pool, sink), ranges=mask)
    with pytest.raises(ValueError, match=r"supports value sizes 32; found 8$"):
        sparse_attention(query, window_kv, None, None, sink, WINDOW, value_size=8, backend="triton")
