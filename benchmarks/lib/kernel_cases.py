"""Cases of benchmarks.kernels: inputs, the call of the Triton backend, the reference, and the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.lib.expert_cases import experts
from benchmarks.lib.indexer_cases import indexer_losses
from benchmarks.lib.kernel_case import Case, Sizes, gradients
from benchmarks.lib.scan_cases import scans
from kernels.cache_io import EntryLayout, Pages, pack, unpack
from kernels.compress import Finish, compress
from kernels.hyper_connections import hc_post, hc_pre
from kernels.index_topk import index_topk
from kernels.newton_schulz import V4_COEFFICIENTS, newton_schulz
from kernels.paged_attention import EntrySet, TokenRows, paged_attention
from kernels.quantize import round_to_format
from kernels.sparse_attention import deterministic_gradients, sparse_attention


def cases(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases, with fresh random inputs. ``dtype`` is that of the attention's operands."""
    yield from _attention(s, device, dtype)
    yield _selection(s, device)
    yield from indexer_losses(s, device, dtype)
    yield from _decoding(s, device)
    yield from _packing(s, device)
    yield from _mixing(s, device)
    yield from _pooling(s, device)
    yield _orthogonalization(s, device, dtype)
    yield from scans(s, device)
    yield from experts(s, device, dtype)


def _attention(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    entries = max(s.chosen, s.tokens // 4)
    query, window_kv, pool = (
        random(1, s.tokens, s.heads, s.dims),
        random(1, s.tokens, s.dims),
        random(1, entries, s.dims),
    )
    sink = torch.randn(s.heads, device=device)
    chosen = torch.rand(1, s.tokens, entries, device=device).topk(s.chosen).indices
    chosen = chosen.masked_fill(torch.rand(chosen.shape, device=device) < 0.01, -1)
    upstream = random(1, s.tokens, s.heads, s.dims)

    def attend(part: int, backend: str, dtype: torch.dtype, leaves: bool) -> tuple[Tensor, list[Tensor]]:
        n = s.tokens // part
        rows = (x.to(dtype) for x in (query[:, :n], window_kv[:, :n], pool))
        logits = sink.double() if dtype == torch.float64 else sink
        given = [x.detach().requires_grad_(leaves) for x in (*rows, logits)]
        out, _ = sparse_attention(*given[:3], None, given[3], s.window, chosen=chosen[:, :n], backend=backend)
        return out, given

    def forward(part: int, backend: str, dtype: torch.dtype = dtype) -> Tensor:
        with torch.no_grad():
            return attend(part, backend, dtype, False)[0]

    def backward(part: int, backend: str, dtype: torch.dtype = dtype) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that computes the gradients. Its first call also runs the forward pass."""
        graph: list[tuple[Tensor, list[Tensor]]] = []

        def run() -> tuple[Tensor, ...]:
            if not graph:
                graph.append(attend(part, backend, dtype, True))
            out, given = graph[0]
            return torch.autograd.grad(out, given, upstream[:, : out.shape[1]].to(out.dtype), retain_graph=True)

        return run

    def reproducible(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with deterministic_gradients():
            return run()

    flops = 4.0 * s.tokens * s.heads * s.dims * (s.chosen + s.window)
    common = {"share": s.share, "tolerance": 0.02}
    yield Case(
        "sparse_attention forward",
        lambda: forward(1, "triton"),
        lambda: forward(s.share, "reference"),
        lambda: forward(1, "reference", torch.float64),
        flops,
        target="300 TFLOP/s",
        **common,
    )
    run = backward(1, "triton")
    for name, call in (
        ("sparse_attention backward", run),
        ("sparse_attention backward, deterministic", lambda: reproducible(run)),
    ):
        yield Case(
            name,
            call,
            backward(s.share, "reference"),
            backward(1, "reference", torch.float64),
            2.5 * flops,
            target="130 TFLOP/s",
            **common,
        )


def _pages(rows: Tensor, B: int, T: int) -> Pages:
    page = 64
    count = -(-T // page)
    table = torch.randperm(B * count, device=rows.device).view(B, count)
    return Pages(rows, page, table)


def _random_rows(count: int, layout: EntryLayout, device: torch.device) -> Tensor:
    return torch.cat([pack(torch.randn(min(4096, count - i), layout.size, device=device), layout, backend="reference")
                      for i in range(0, count, 4096)])  # fmt: skip


def _selection(s: Sizes, device: torch.device) -> Case:
    layout = EntryLayout(s.index_dims, "fp4")
    query = round_to_format(
        torch.randn(1, s.index_queries, s.index_heads, s.index_dims, device=device), "fp4", backend="reference"
    )
    weights = torch.randn(1, s.index_queries, s.index_heads, device=device)
    keys = _pages(_random_rows(-(-s.entries // 64) * 64, layout, device), 1, s.entries)
    visible = (s.entries - s.index_queries // 4 + torch.arange(s.index_queries, device=device) // 4).view(1, -1)

    def choose(part: int, backend: str) -> Tensor:
        n = s.index_queries // part
        return index_topk(query[:, :n], keys, layout, weights[:, :n], visible[:, :n], s.chosen, backend=backend)

    def best_scores(chosen: Tensor) -> Tensor:
        rows = unpack(keys.gather(torch.arange(s.entries, device=device).view(1, -1)), layout, backend="reference")
        products = torch.einsum("bshc,btc->bsht", query.double(), rows.double()).relu()
        scores = (products * weights.double().unsqueeze(-1)).sum(2)
        seen = torch.arange(s.entries, device=device) < visible.unsqueeze(-1)
        scores = scores.masked_fill(~seen, float("-inf"))
        return scores.topk(s.chosen).values if chosen is None else scores.gather(-1, chosen)

    checks = s.share == 1  # the scores of all queries in float64 fit into memory at the checked sizes only
    return Case(
        "index_topk",
        (lambda: best_scores(choose(1, "triton"))) if checks else (lambda: choose(1, "triton")),
        lambda: choose(s.share, "eager"),
        lambda: best_scores(None),
        2.0 * s.index_queries * s.entries * s.index_heads * s.index_dims,
        share=s.share,
        tolerance=1e-5,
        target="45% of the products' ceiling",
    )


def _decoding(s: Sizes, device: torch.device) -> Iterator[Case]:
    layout = EntryLayout(s.dims - s.rope, "fp8", s.rope)
    query = torch.randn(s.batch, 1, s.heads, s.dims, device=device)
    sink = torch.randn(s.heads, device=device)
    first = torch.full((s.batch,), s.context - 1, device=device)
    ring = _random_rows(s.batch * 256, layout, device).view(s.batch, 256, -1)
    tokens = TokenRows(ring, torch.zeros(1, dtype=torch.int64, device=device), first)

    def case(name: str, entries: EntrySet, read: int) -> Case:
        def attend(backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
            with torch.no_grad():
                return paged_attention(
                    query.to(dtype), tokens, entries, sink.to(dtype), layout, s.window, backend=backend
                )

        return Case(
            name,
            lambda: attend("triton"),
            lambda: attend("eager"),
            lambda: attend("reference", torch.float64),
            nbytes=float(s.batch * (read + s.window) * layout.nbytes),
            tolerance=0.02,
            target="70% of bandwidth",
        )

    count = s.context // 128
    pages = _pages(_random_rows(s.batch * -(-count // 64) * 64, layout, device), s.batch, count)
    yield case("decode, all entries", EntrySet(pages, visible=torch.full((s.batch, 1), count, device=device)), count)
    count = s.context // 4 // 16  # of all entries, a sixteenth in distinct pages is enough to miss the cache
    k = min(s.chosen, count)
    pages = _pages(_random_rows(s.batch * -(-count // 64) * 64, layout, device), s.batch, count)
    chosen = torch.rand(s.batch, 1, count, device=device).topk(k).indices
    yield case("decode, chosen entries", EntrySet(pages, chosen=chosen), k)


def _packing(s: Sizes, device: torch.device) -> Iterator[Case]:
    layout = EntryLayout(s.dims - s.rope, "fp8", s.rope)
    x = torch.randn(s.rows, s.dims, device=device)
    packed = pack(x, layout, backend="reference")
    narrow = x.bfloat16()
    moved = float(s.rows * (4 * s.dims + layout.nbytes))
    pairs: list[tuple[str, Callable[[str], Tensor], float]] = [
        ("pack, fp8 entries", lambda backend: pack(x, layout, backend=backend), moved),
        ("unpack, fp8 entries", lambda backend: unpack(packed, layout, backend=backend), moved),
        *(
            (
                f"fake-quantize, {fmt}",
                lambda b, fmt=fmt: round_to_format(narrow, fmt, torch.bfloat16, b),
                4.0 * x.numel(),
            )
            for fmt in ("fp8", "fp4")
        ),
    ]
    for name, call, nbytes in pairs:
        yield Case(
            name,
            lambda call=call: call("triton"),
            lambda call=call: call("reference"),
            lambda call=call: call("reference"),
            nbytes=nbytes,
            target="75% of bandwidth",
        )


def _mixing(s: Sizes, device: torch.device) -> Iterator[Case]:
    n, tokens = 4, s.tokens * 4
    m = 2 * n + n * n
    streams = torch.randn(1, tokens, n, s.width, device=device)
    fn, scale, base = (torch.randn(*shape, device=device) * 0.02 for shape in ((m, n * s.width), (3,), (m,)))
    norm_weight = torch.randn(s.width, device=device)
    output = torch.randn(1, tokens, s.width, device=device)
    upstream = torch.randn(streams.shape, device=device)
    row = 4.0 * tokens * s.width

    def layer(backend: str) -> Callable[..., Tensor]:
        def run(streams: Tensor, *weights_and_output: Tensor) -> Tensor:
            *weights, output = weights_and_output
            x, post, comb, entered = hc_pre(streams, *weights, 20, 1e-6, 1e-6, backend=backend)
            return hc_post(entered, comb, post, output + x, backend=backend)

        return run

    given = [streams, fn, scale, base, norm_weight, output]

    def forward(backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.no_grad():
            return layer(backend)(*(x.to(dtype) for x in given))

    common = {"tolerance": 1e-4, "target": "75% of bandwidth"}
    yield Case(
        "hyper_connections forward",
        lambda: forward("triton"),
        lambda: forward("reference"),
        lambda: forward("reference", torch.float64),
        nbytes=row * (4 * n + 5),
        **common,
    )
    yield Case(
        "hyper_connections forward + backward",
        lambda: gradients(layer("triton"), given, upstream, torch.float32),
        lambda: gradients(layer("reference"), given, upstream, torch.float32),
        lambda: gradients(layer("reference"), given, upstream, torch.float64),
        nbytes=row * (12 * n + 14),
        **common,
    )


def _pooling(s: Sizes, device: torch.device) -> Iterator[Case]:
    for kind, m, overlap in (("overlap", 4, True), ("128 tokens", 128, False)):
        w = s.dims * (1 + overlap)
        n = -(-s.rows // m)
        angles = torch.rand(1, n, s.rope // 2, device=device) * 6
        given = [torch.randn(*shape, device=device) for shape in ((1, n * m, 2 * w), (m, w), (s.dims,))]
        upstream = torch.randn(1, n, s.dims, device=device)

        def call(backend: str, overlap: bool = overlap, angles: Tensor = angles) -> Callable[..., Tensor]:
            def run(rows: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
                finish = Finish(weight, 1e-6, angles.cos().to(rows.dtype), angles.sin().to(rows.dtype))
                return compress(rows, bias, finish, overlap, backend=backend)

            return run

        def both(backend: str, dtype: torch.dtype, call=call, given=given, upstream=upstream) -> tuple[Tensor, ...]:
            return gradients(call(backend), given, upstream, dtype)

        yield Case(
            f"compress forward + backward, {kind}",
            lambda both=both: both("triton", torch.float32),
            lambda both=both: both("reference", torch.float32),
            lambda both=both: both("reference", torch.float64),
            nbytes=3.0 * given[0].numel() * 4,
            tolerance=1e-5,
            target="75% of bandwidth",
        )


def _orthogonalization(s: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    matrices = torch.randn(s.matrices, s.matrix, s.matrix, device=device).to(dtype)
    # Useful products of the iteration: two symmetric ones, of which half is needed, and one that is not.
    flops = len(V4_COEFFICIENTS) * s.matrices * 2.0 * s.matrix**3 * (0.5 + 0.5 + 1)
    return Case(
        "newton_schulz",
        lambda: newton_schulz(matrices, dtype=dtype, backend="triton"),
        lambda: newton_schulz(matrices, dtype=dtype, backend="reference"),
        lambda: newton_schulz(matrices.double(), dtype=torch.float64, backend="reference"),
        flops,
        tolerance=0.1,  # small singular values grow by 12 in a step, and with them the rounding of BF16
        target="60% of the products' ceiling",
    )
