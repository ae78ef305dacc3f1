"""One layer against its formula, in both of its implementations."""

import pytest
import torch

from kernels.hyper_connections import hc_post, hc_pre
from kernels.rms_norm import rms_norm
from model.forward.execution import Execution
from tests.model.networks import EXACT, build, random_ids


@pytest.mark.parametrize("mode", ["auto", "batch-invariant"])
@pytest.mark.parametrize("hyper", [True, False])
@torch.no_grad()
def test_each_half_normalizes_its_input_with_its_own_norm(hyper, mode):
    model = build(**EXACT, layers=("gqa",), hyper_connections=hyper)
    block, config, ids = model.layers[0], model.config, random_ids(2, 9)
    for norm in (block.attn_norm, block.ffn_norm):
        norm.weight.uniform_(-2, 2)
    streams = torch.randn(2, 9, 4, 32) if hyper else torch.randn(2, 9, 32)
    context = model._context(ids, None, None, "sparse", None, None)

    def half(streams, residual, norm, block):
        if not hyper:
            return streams + block(rms_norm(streams, config.norm_eps, norm.weight, "reference"))
        weights = residual.fn, residual.scale, residual.base, norm.weight
        settings = config.hc_sinkhorn_iters, config.hc_eps, config.norm_eps
        x, post, comb, _ = hc_pre(streams, *weights, *settings, backend="reference")
        return hc_post(streams, comb, post, block(x), backend="reference")

    between = half(streams, block.attn_residual, block.attn_norm, lambda x: block.attn(x, context))
    expected = half(between, block.ffn_residual, block.ffn_norm, lambda x: block.ffn(x, ids, context))
    model.execution = Execution(mode)
    found = block(streams, ids, model._context(ids, None, None, "sparse", None, None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
