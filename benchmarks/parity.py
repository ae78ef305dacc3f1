"""Numerical parity with transformers' ``DeepseekV4ForCausalLM``: the largest difference per configuration.

    python -m benchmarks.parity [--only NAME ...] [--write docs/parity.md]

For every configuration, transformers initializes a random model and saves it, and we import it. These are compared in
float32 without rounding: full sequences of each length from 1 to 300; 300 tokens decoded one by one from our cache; a
prompt in two chunks, split at every position; and the gradients of all parameters that transformers trains. The tests
run a part of this.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from benchmarks.lib.harness import Result, make_parser, run_benchmark, run_main
from benchmarks.lib.parity import TOKENS, Pair, check_margin, comparisons, make_pair, table

VOCAB = 64
S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 128,
    "max_position_embeddings": 512,
    "layer_types": [S, C, H],
    "num_hash_layers": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _ratios(csa: int, hca: int) -> dict[str, Any]:
    return {"compress_rates": {C: csa, H: hca}}


def _yarn(factor: float, original: int, **more: Any) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}
    return {"rope_parameters": {"beta_fast": 32, "beta_slow": 1, **yarn}}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sliding layers only": {"layer_types": [S] * 3},
    "csa layers only": {"layer_types": [C] * 3},
    "hca layers only": {"layer_types": [H] * 3, **_ratios(4, 8)},
    "schedule as in Flash": {"layer_types": [S, S, C, H, C, H, C]},
    "schedule as in Pro": {"layer_types": [H, H, C, H, C, H, C]},
    "hash-routed layers only": {"num_hash_layers": 3},
    "scored layers only": {"num_hash_layers": 0},
    "8 experts, top 3, scale 2.5": {"n_routed_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
    "SwiGLU limit 0.5": {"swiglu_limit": 0.5},
    **{
        f"{n} heads per group": {"num_attention_heads": n * groups, "o_groups": groups}
        for n, groups in ((1, 4), (2, 3), (3, 2), (4, 2), (5, 1), (6, 1), (7, 2), (8, 2))
    },
    "window below the ratios (3; 4, 8)": {"sliding_window": 3, **_ratios(4, 8)},
    "window at the csa ratio (4; 4, 8)": {"sliding_window": 4, **_ratios(4, 8)},
    "window at the hca ratio (8; 4, 8)": {"sliding_window": 8, **_ratios(4, 8)},
    "window above the ratios (20; 4, 8)": {"sliding_window": 20, **_ratios(4, 8)},
    "window of 1": {"sliding_window": 1, **_ratios(4, 8)},
    "ratios 2 and 6": _ratios(2, 6),
    "ratios 3 and 5": _ratios(3, 5),
    "ratios 8 and 4": _ratios(8, 4),
    "ratios 16 and 64": _ratios(16, 64),
    "YaRN, factor 16 over 64": _yarn(16.0, 64),
    "YaRN, factor 4 over 128, betas 16 and 2": _yarn(4.0, 128, beta_fast=16, beta_slow=2),
    "YaRN, factor 40 over 4096": _yarn(40.0, 4096),
    "top-k 2": {"index_topk": 2, "layer_types": [C, C]},
    "top-k 8": {"index_topk": 8, "layer_types": [S, C, H, C]},
    "top-k 8 of ratio 2": {"index_topk": 8, "layer_types": [C, H, C], **_ratios(2, 16)},
    "top-k 32": {"index_topk": 32, "layer_types": [S, C, C]},
    "2 residual streams": {"hc_mult": 2},
    "3 residual streams, 5 Sinkhorn iterations": {"hc_mult": 3, "hc_sinkhorn_iters": 5},
    "released proportions": {
        "hidden_size": 128,
        "num_attention_heads": 16,
        "head_dim": 64,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 128,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_topk": 16,
        "n_routed_experts": 16,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "layer_types": [S, S, C, H, C],
        **_yarn(16.0, 64),
        **_ratios(4, 128),
    },
}

# Random index scores can be tied in float32. Seeds for configurations with unselected entries avoid that.
SEEDS = {
    "ratios 2 and 6": 38,
    "top-k 2": 2,
    "top-k 8": 25,
    "top-k 8 of ratio 2": 15,
    "top-k 32": 6,
    "released proportions": 36,
}
MARGIN = 1e-4
"""Minimum gap between selected and unselected scores for a valid comparison."""


def draw(configuration: dict[str, Any], seed: int = 0) -> DeepseekV4ForCausalLM:
    """Return transformers' network with random weights, none at 0 or 1, that give logits of unit scale."""
    merged = {**BASE, **configuration}
    config = DeepseekV4Config(num_hidden_layers=len(merged["layer_types"]), **merged)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(seed)
    oracle = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if name.endswith(("sinks", "base", "scale")):
                p.normal_(std=0.7)
            elif p.dim() == 1:
                p.normal_(mean=1.0, std=0.2)
            elif name.endswith("position_bias"):
                p.normal_()
            else:
                p.normal_(std=p.shape[-1] ** -0.5)
        for name, b in oracle.named_buffers():
            if name.endswith("tid2eid"):
                b.copy_(torch.rand(b.shape[0], config.n_routed_experts).argsort(-1)[:, : b.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                b.normal_(std=0.3)
    return oracle


def pair(name: str, batch: int = 1) -> Pair:
    """Initialize configuration ``name`` in transformers, save it with transformers' defaults, and import it."""
    return make_pair(draw(CONFIGURATIONS[name], SEEDS.get(name, 0)), batch)


@torch.no_grad()
def selection_margin(p: Pair) -> float:
    """Return the smallest gap between the last selected and the first unselected entry over all queries.

    Below float32's noise, both networks may select differently and be correct, so the seed is not usable. Infinite if
    every entry is selected.
    """
    smallest = float("inf")
    for layer in p.oracle.model.layers:
        indexer = getattr(layer.self_attn.compressor, "indexer", None)
        if indexer is None:
            continue
        scores: list[Tensor] = []
        hook = indexer.scorer.register_forward_hook(lambda m, i, out, into=scores: into.append(out))
        p.oracle(p.ids, use_cache=False)
        hook.remove()
        visible = (torch.arange(TOKENS) + 1) // indexer.compress_rate
        hidden = torch.arange(scores[0].shape[-1]) >= visible.unsqueeze(-1)
        ranked = scores[0].masked_fill(hidden, float("-inf")).sort(-1, descending=True).values
        k = indexer.index_topk
        if ranked.shape[-1] > k:
            gaps = (ranked[..., k - 1] - ranked[..., k])[:, visible > k]
            smallest = min(smallest, float(gaps.min()))
    return smallest


def measure(name: str) -> dict[str, Any]:
    """Run all comparisons for one configuration. Raises FiftyfoldError if its selections are nearly tied."""
    p = pair(name)
    check_margin(name, selection_margin(p), MARGIN)
    return {"name": name} | comparisons(p)


def run(options: argparse.Namespace) -> Result:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name in options.only:
        started = time.monotonic()
        rows.append(measure(name))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return Result(table(rows), has_times=False)


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    run_main(main)
