import pytest
import torch
from backend_testing import needs_native

from kernels import cache_io, projection, rotary
from kernels.cache_io import EntryLayout


@needs_native
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3)])
@torch.no_grad()
def test_cpu_equals_exact_projections(batch, tokens, stored):
    hidden, rank, heads, c = 24, 12, 4, 16
    shapes = {"wq_a": (rank, hidden), "wq_b": (heads * c, rank), "wkv": (c, hidden), "wo_a": (2, 8, 2 * c)}
    shapes |= {"wo_b": (hidden, 16), "index": (4 * 8, rank)}
    weight = {name: torch.randn(shape).to(stored) for name, shape in shapes.items()}
    exact = {name: w.float() for name, w in weight.items()}
    x, norm, kv_norm = torch.randn(batch, tokens, hidden), torch.randn(rank), torch.randn(c)
    attended, layout = torch.randn(batch, tokens, heads, c), EntryLayout(8, "fp32", 8, "fp32")
    positions = torch.randint(0, 5000, (batch, tokens))
    assert projection.backend_for(x, weight["wkv"]) == "cpu"
    for some in (positions, positions[:1]):
        cos, sin = rotary.angles(some, 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
        found, expected = (
            (
                *projection.latent_query(x, w["wq_a"], norm, w["wq_b"], cos, sin, heads, 1e-6, backend=b),
                projection.grouped_output(attended, cos, sin, w["wo_a"], w["wo_b"], backend=b),
                projection.index_query(x[..., :rank], w["index"], cos, sin, 4, backend=b),
                cache_io.unpack(projection.packed_key_value(x, w["wkv"], kv_norm, cos, sin, 1e-6, layout, b), layout),
            )
            for b, w in (("cpu", weight), ("reference", exact))
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
