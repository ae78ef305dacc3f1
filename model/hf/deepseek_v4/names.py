"""Tensor names in the two published layouts, and the storage format of each tensor in the released one.

``released`` is the layout of DeepSeek's checkpoints, ``transformers`` that of ``DeepseekV4ForCausalLM``'s modules. By
default transformers 5.23 converts some names back when it saves, which mixes both layouts. :func:`canonical_name`
maps all variants to one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Size

from model.hf.tensors import Layout, Source, TensorSlice, WeightFormat, split_name


@dataclass(frozen=True)
class Names:
    """Our name of a tensor, its name in both layouts and its storage format in the released one."""

    ours: str
    released: str
    transformers: str
    format: WeightFormat


def _table(text: str) -> tuple[Names, ...]:
    """Parse lines of our name, released name (= if equal), transformers name and released format. A final dot stands
    for ``.weight``."""
    found = []
    for line in text.strip().splitlines():
        ours, released, other, stored = (word + "weight" if word.endswith(".") else word for word in line.split())
        found.append(Names(ours, ours if released == "=" else released, other, cast(WeightFormat, stored)))
    return tuple(found)


MODEL = _table("""
    embed.            =              model.embed_tokens.     bf16
    head.             =              lm_head.                bf16
    norm.             =              model.norm.             bf16
    hyper_head.fn     hc_head_fn     model.hc_head.hc_fn     fp32
    hyper_head.base   hc_head_base   model.hc_head.hc_base   fp32
    hyper_head.scale  hc_head_scale  model.hc_head.hc_scale  fp32
""")
# The prefix is layers.N or mtp.0 in our and the released names, and model.layers.N in transformers. There mtp.0 keeps
# its released names, because transformers has no such module and ignores tensors named mtp.
BLOCK = _table("""
    attn_norm.                      =                       input_layernorm.                                   bf16
    ffn_norm.                       =                       post_attention_layernorm.                          bf16
    attn_residual.fn                hc_attn_fn              attn_hc.fn                                         fp32
    attn_residual.base              hc_attn_base            attn_hc.base                                       fp32
    attn_residual.scale             hc_attn_scale           attn_hc.scale                                      fp32
    ffn_residual.fn                 hc_ffn_fn               ffn_hc.fn                                          fp32
    ffn_residual.base               hc_ffn_base             ffn_hc.base                                        fp32
    ffn_residual.scale              hc_ffn_scale            ffn_hc.scale                                       fp32
    attn.wq_a.                      =                       self_attn.q_a_proj.                                fp8
    attn.q_norm.                    =                       self_attn.q_a_norm.                                bf16
    attn.wq_b.                      =                       self_attn.q_b_proj.                                fp8
    attn.wkv.                       =                       self_attn.kv_proj.                                 fp8
    attn.kv_norm.                   =                       self_attn.kv_norm.                                 bf16
    attn.sink                       attn.attn_sink          self_attn.sinks                                    fp32
    attn.wo_a                       attn.wo_a.              self_attn.o_a_proj.                                fp8
    attn.wo_b.                      =                       self_attn.o_b_proj.                                fp8
    attn.compressor.wkv.            =                       self_attn.compressor.kv_proj.                      bf16
    attn.compressor.wgate.          =                       self_attn.compressor.gate_proj.                    bf16
    attn.compressor.ape             =                       self_attn.compressor.position_bias                 fp32
    attn.compressor.norm.           =                       self_attn.compressor.kv_norm.                      bf16
    attn.indexer.wq_b.              =                       self_attn.compressor.indexer.q_b_proj.             fp8
    attn.indexer.weights_proj.      =                       self_attn.compressor.indexer.scorer.weights_proj.  bf16
    attn.indexer.compressor.wkv.    =                       self_attn.compressor.indexer.kv_proj.              bf16
    attn.indexer.compressor.wgate.  =                       self_attn.compressor.indexer.gate_proj.            bf16
    attn.indexer.compressor.ape     =                       self_attn.compressor.indexer.position_bias         fp32
    attn.indexer.compressor.norm.   =                       self_attn.compressor.indexer.kv_norm.              bf16
    ffn.router.                     ffn.gate.               mlp.gate.                                          bf16
    ffn.router_bias                 ffn.gate.bias           mlp.gate.e_score_correction_bias                   fp32
    ffn.tid2eid                     ffn.gate.tid2eid        mlp.gate.tid2eid                                   int64
    ffn.shared.w1.                  ffn.shared_experts.w1.  mlp.shared_experts.gate_proj.                      fp8
    ffn.shared.w2.                  ffn.shared_experts.w2.  mlp.shared_experts.down_proj.                      fp8
    ffn.shared.w3.                  ffn.shared_experts.w3.  mlp.shared_experts.up_proj.                        fp8
""")
MTP = _table("""
    e_proj.           =              -  fp8
    h_proj.           =              -  fp8
    enorm.            =              -  bf16
    hnorm.            =              -  bf16
    norm.             =              -  bf16
    hyper_head.fn     hc_head_fn     -  fp32
    hyper_head.base   hc_head_base   -  fp32
    hyper_head.scale  hc_head_scale  -  fp32
""")
EXPERT_STACKS = ("ffn.w1", "ffn.w2", "ffn.w3")
"""Stacks [E, out, in]. The release has a tensor per expert (``ffn.experts.E.w1.weight``), transformers one stack of w1
above w3 and one of w2."""


def sources(shapes: dict[str, Size], layout: Layout) -> dict[str, Source]:
    """Return all tensors of a checkpoint in ``layout`` by name, for a model with tensors of these shapes.

    The balance bias of a hash-routed layer is unused and has no counterpart.
    """
    found = {}
    for ours, shape in shapes.items():
        prefix, leaf = split_name(ours)
        if leaf == "ffn.router_bias" and prefix and prefix + "ffn.tid2eid" in shapes:
            continue
        if leaf in EXPERT_STACKS:
            made = _expert_sources(prefix, leaf, shape, layout)
        else:
            names = _names_of(prefix, leaf)
            stored_shape = (shape[0] * shape[1], shape[2]) if leaf == "attn.wo_a" else tuple(shape)
            name = prefix + names.released
            if layout == "transformers" and not prefix.startswith("mtp."):
                name = (f"model.{prefix}" if prefix else "") + names.transformers
            made = [Source(name, stored_shape, names.format, (TensorSlice(ours),))]
        for source in made:
            found[source.name] = source
    return found


_REPLACEMENTS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        (r"\.compressor\.indexer\.scorer\.", ".indexer."),
        (r"\.compressor\.indexer\.(q_b_proj|wq_b)\.", ".indexer.wq_b."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.position_bias$", ".ape"),
        (r"\.q_a_proj\.", ".wq_a."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.q_b_proj\.", ".wq_b."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.o_([ab])_proj\.", r".wo_\1."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    )
)


def canonical_name(name: str) -> str:
    """Return one name for all variants of a tensor's name. transformers converts names one by one when it saves; which
    ones depends on the folder that the network was loaded from."""
    for pattern, replacement in _REPLACEMENTS:
        name = pattern.sub(replacement, name)
    return name


def detect_layout(names: Iterable[str]) -> Layout:
    """Return the layout. Only transformers stores all experts of a layer in one tensor."""
    return "transformers" if any(name.endswith(".experts.gate_up_proj") for name in names) else "released"


_ROWS = {prefix: {n.ours: n for n in rows} for prefix, rows in (("", MODEL), ("layers", BLOCK), ("mtp", MTP + BLOCK))}


def _names_of(prefix: str, leaf: str) -> Names:
    try:
        return _ROWS[prefix.split(".")[0]][leaf]
    except KeyError:
        raise KeyError(f"tensor '{prefix}{leaf}' has no name in the published layouts") from None


def _expert_sources(prefix: str, leaf: str, shape: Size, layout: Layout) -> list[Source]:
    experts, rows, columns = shape
    ours, w = prefix + leaf, leaf.removeprefix("ffn.")
    if layout == "released" or prefix.startswith("mtp."):
        return [
            Source(f"{prefix}ffn.experts.{e}.{w}.weight", (rows, columns), "fp4", (TensorSlice(ours, expert=e),))
            for e in range(experts)
        ]
    base = f"model.{prefix}mlp.experts"
    if w == "w2":
        return [Source(f"{base}.down_proj", (experts, rows, columns), "fp4", (TensorSlice(ours),))]
    if w == "w3":
        return []  # part of gate_up_proj
    parts = (TensorSlice(ours, rows=(0, rows)), TensorSlice(f"{prefix}ffn.w3", rows=(rows, 2 * rows)))
    return [Source(f"{base}.gate_up_proj", (experts, 2 * rows, columns), "fp4", parts)]
