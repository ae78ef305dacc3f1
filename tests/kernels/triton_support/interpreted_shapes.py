"""Run by test_interpreted.py with TRITON_INTERPRET=1: no kernel is launched for tensors that it would read beyond."""

import re

import pytest
import torch

from kernels.cache_io import EntryLayout, Pages
from kernels.compress import DocumentBlocks, Finish, compress, compress_next
from kernels.entry_ranges import EntryRanges
from kernels.expert_dispatch import by_expert, run_experts
from kernels.gated_delta_rule import gated_delta_rule
from kernels.hyper_connections import hc_post, hc_pre
from kernels.index_topk import index_topk, select_entries
from kernels.indexer_kl import indexer_kl
from kernels.paged_attention import EntrySet, TokenRows, paged_attention
from kernels.sparse_attention import StoredMass, sparse_attention
from kernels.ssd_scan import ssd_scan

B, S, H, c, T, n = 2, 3, 4, 32, 5, 2
LAYOUT = EntryLayout(c, "fp8")


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def attend_to_pages(query, rows, offsets, first, storage, page_table, chosen, visible, sink):
    tokens = TokenRows(rows, offsets, first)
    for entries in ({"chosen": chosen}, {"visible": visible}):
        found = EntrySet(Pages(storage, 2, page_table), **entries)
        paged_attention(query, tokens, found, sink, LAYOUT, 2, backend="triton")


def pool(rows, bias, norm_weight, first, starts):
    finish = Finish(norm_weight, 1e-6, torch.ones(1, n, 2), torch.zeros(1, n, 2))
    compress(rows, bias, finish, True, blocks=DocumentBlocks(first, starts), backend="triton")


def pool_into_pages(rows, bias, norm_weight, ring, storage, page_table):
    finish = Finish(norm_weight, 1e-6, torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
    pages = Pages(storage, 2, page_table)
    compress_next(ring, rows, bias, finish, integers(B), True, LAYOUT, pages, backend="triton")


def attend(query, window_kv, entries, sink, first, end, chosen):
    for entry_mask, selected in ((EntryRanges(first, end), None), (None, chosen)):
        sparse_attention(query, window_kv, entries, entry_mask, sink, 2, chosen=selected, backend="triton")


def learn(query, keys, head_weights, mass, first, end, chosen):
    for selected in (None, chosen):
        indexer_kl(query, keys, head_weights, StoredMass(mass), EntryRanges(first, end), selected, backend="triton")


def experts(rows, gains, w1, w3, w2, chosen):
    run_experts(rows, gains, (w1, w3, w2), by_expert(chosen, 3), 10.0, backend="triton")


CALLS = {
    "paged_attention": (
        attend_to_pages,
        {
            "query": torch.zeros(B, S, H, c), "rows": torch.zeros(B, 7, LAYOUT.nbytes, dtype=torch.uint8),
            "offsets": integers(B), "first": integers(B), "storage": torch.zeros(8, LAYOUT.nbytes, dtype=torch.uint8),
            "page_table": integers(B, 2), "chosen": integers(B, S, 3), "visible": integers(B, S),
            "sink": torch.zeros(H),
        },
    ),
    "compress": (
        pool,
        {
            "rows": torch.zeros(B, 9, 4 * c), "bias": torch.zeros(4, 2 * c), "norm_weight": torch.ones(c),
            "first": integers(B, n), "starts": torch.ones(B, n, dtype=torch.bool),
        },
    ),
    "compress_next": (
        pool_into_pages,
        {
            "rows": torch.zeros(B, 1, 4 * c), "bias": torch.zeros(4, 2 * c), "norm_weight": torch.ones(c),
            "ring": torch.zeros(B, 7, 4 * c), "storage": torch.zeros(8, LAYOUT.nbytes, dtype=torch.uint8),
            "page_table": integers(B, 2),
        },
    ),
    "index_topk": (
        lambda query, storage, page_table, head_weights, visible: index_topk(
            query, Pages(storage, 2, page_table), LAYOUT, head_weights, visible, 2, backend="triton"
        ),
        {
            "query": torch.zeros(B, S, H, c), "storage": torch.zeros(8, LAYOUT.nbytes, dtype=torch.uint8),
            "page_table": integers(B, 2), "head_weights": torch.zeros(B, S, H), "visible": integers(B, S),
        },
    ),
    "select_entries": (
        lambda query, keys, head_weights, first, end: select_entries(
            query, keys, head_weights, EntryRanges(first, end), 2, backend="triton"
        ),
        {
            "query": torch.zeros(B, S, H, c), "keys": torch.zeros(B, T, c), "head_weights": torch.zeros(B, S, H),
            "first": integers(B, S), "end": integers(B, S),
        },
    ),
    "indexer_kl": (
        learn,
        {
            "query": torch.zeros(B, S, H, c), "keys": torch.zeros(B, T, c), "head_weights": torch.zeros(B, S, H),
            "mass": torch.ones(B, S, T), "first": integers(B, S), "end": integers(B, S) + 2,
            "chosen": integers(B, S, T),
        },
    ),
    "sparse_attention": (
        attend,
        {
            "query": torch.zeros(B, S, H, c), "window_kv": torch.zeros(B, S, c), "entries": torch.zeros(B, T, c),
            "sink": torch.zeros(H), "first": integers(B, S), "end": integers(B, S), "chosen": integers(B, S, 2),
        },
    ),
    "hyper_connections (in)": (
        lambda streams, fn, scale, base, norm_weight: hc_pre(
            streams, fn, scale, base, norm_weight, 2, 1e-6, 1e-6, backend="triton"
        ),
        {
            "streams": torch.zeros(B, S, 2, c), "fn": torch.zeros(8, 2 * c), "scale": torch.zeros(3),
            "base": torch.zeros(8), "norm_weight": torch.zeros(c),
        },
    ),
    "hyper_connections (out)": (
        lambda streams, comb, post, output: hc_post(streams, comb, post, output, backend="triton"),
        {
            "streams": torch.zeros(B, S, 2, c), "comb": torch.zeros(B, S, 2, 2), "post": torch.zeros(B, S, 2),
            "output": torch.zeros(B, S, c),
        },
    ),
    "ssd_scan": (
        lambda **arguments: ssd_scan(**arguments, backend="triton"),
        {
            "x": torch.zeros(B, S, H, 16), "dt": torch.ones(B, S, H), "A": -torch.ones(H), "D": torch.zeros(H),
            "B": torch.zeros(B, S, 2, 16), "C": torch.zeros(B, S, 2, 16), "state": torch.zeros(B, H, 16, 16),
            "positions": integers(B, S),
        },
    ),
    "gated_delta_rule": (
        lambda **arguments: gated_delta_rule(**arguments, backend="triton"),
        {
            "q": torch.zeros(B, S, H, 16), "k": torch.zeros(B, S, H, 16), "v": torch.zeros(B, S, H, 16),
            "g": torch.zeros(B, S, H, 16), "beta": torch.zeros(B, S, H), "state": torch.zeros(B, H, 16, 16),
            "positions": integers(B, S),
        },
    ),
    "expert_dispatch": (
        experts,
        {
            "rows": torch.zeros(6, c), "gains": torch.ones(6, 1), "w1": torch.zeros(3, 16, c),
            "w3": torch.zeros(3, 16, c), "w2": torch.zeros(3, c, 16), "chosen": integers(3, 2),
        },
    ),
}  # fmt: skip
FREE = {  # sizes that other arguments must follow, or that nothing else fixes
    ("paged_attention", "rows", 1), ("paged_attention", "storage", 0), ("paged_attention", "page_table", 1),
    ("paged_attention", "chosen", 2), ("compress", "rows", 1), ("compress", "bias", 0), ("compress_next", "rows", 1),
    ("compress_next", "bias", 0), ("compress_next", "storage", 0), ("compress_next", "page_table", 1),
    ("index_topk", "storage", 0), ("index_topk", "page_table", 1), ("select_entries", "keys", 1),
    ("indexer_kl", "keys", 1), ("indexer_kl", "chosen", 2), ("sparse_attention", "entries", 1),
    ("sparse_attention", "chosen", 2), ("gated_delta_rule", "v", 3),
    ("hyper_connections (in)", "streams", 0), ("hyper_connections (in)", "streams", 1),
}  # fmt: skip
OTHER_REASONS = {  # a tensor that decides about a size is not named, but the first one that does not fit it
    ("paged_attention", "query"): {0: ": rows must", 1: ": chosen must", 2: ": sink must"},
    ("compress", "rows"): {0: ": first must"},
    ("compress", "norm_weight"): {0: "supports even numbers of channels"},
    ("compress", "first"): {1: ": starts must"},
    ("compress_next", "rows"): {0: ": lengths must"},
    ("compress_next", "bias"): {1: ": ring must"},
    ("compress_next", "norm_weight"): {0: "supports even numbers of channels"},
    ("index_topk", "query"): {0: ": head_weights must", 1: ": head_weights must", 2: ": head_weights must"},
    ("select_entries", "query"): {
        0: ": head_weights must", 1: ": head_weights must", 2: ": head_weights must", 3: ": keys must",
    },
    ("indexer_kl", "query"): {0: ": keys must", 1: ": head_weights must", 2: ": head_weights must", 3: ": keys must"},
    ("sparse_attention", "query"): {
        0: ": window_kv must", 1: ": first must", 2: ": sink must", 3: "supports head dims",
    },
    ("hyper_connections (in)", "streams"): {2: ": fn must", 3: ": fn must"},
    ("hyper_connections (out)", "streams"): {0: ": comb must", 1: ": comb must", 2: ": comb must", 3: ": output must"},
    ("ssd_scan", "x"): {0: ": dt must", 1: ": dt must", 2: "heads do not divide", 3: ": state must"},
    ("ssd_scan", "B"): {2: ": C must", 3: ": C must"},
    ("gated_delta_rule", "q"): {0: ": k must", 1: ": k must", 2: ": k must", 3: ": k must"},
    ("expert_dispatch", "rows"): {0: ": gains must", 1: ": w1 must"},
    ("expert_dispatch", "w1"): {0: ": w3 must", 1: ": w3 must"},
}  # fmt: skip
MAY_BE_SHARED = {"offsets", "first", "visible", "end"}
CASES = [
    (operation, name, dim)
    for operation, (_, arguments) in CALLS.items()
    for name, x in arguments.items()
    for dim in range(x.dim())
    if (operation, name, dim) not in FREE and (operation, name) != ("expert_dispatch", "chosen")
]


@pytest.mark.parametrize("operation", CALLS)
@torch.no_grad()
def test_the_arguments_themselves_are_accepted(operation):
    call, arguments = CALLS[operation]
    call(**arguments)


@pytest.mark.parametrize(("operation", "name", "dim"), CASES)
@torch.no_grad()
def test_a_tensor_that_is_too_small_is_refused(operation, name, dim):
    call, arguments = CALLS[operation]
    x = arguments[name]
    rest = x.shape[dim] - 1
    if dim == 0 and name in MAY_BE_SHARED and rest == 1 and operation != "compress":
        rest = 0
    reason = OTHER_REASONS.get((operation, name), {}).get(dim, f": {name} must have the shape ")
    with pytest.raises(ValueError, match=re.escape(reason)):
        call(**{**arguments, name: x.narrow(dim, 0, rest).contiguous()})
