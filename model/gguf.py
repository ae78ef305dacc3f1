"""Export to GGUF files for llama.cpp, architecture ``deepseek4``.

Names, shapes and metadata follow llama.cpp's loader (src/models/deepseek4.cpp). Only :func:`export_gguf` imports the
optional package ``gguf``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from model.atomic_files import atomic_file, made_parents
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.finite import is_finite
from model.mixers import MIXERS
from model.mixers.hca import HeavilyCompressedAttention
from model.precision import Precision
from model.transformer import Transformer
from model.wording import quote

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "deepseek4"
WeightType = Literal["f32", "f16", "q8_0"]

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""``general.file_type``, llama.cpp's enum llama_ftype."""
_SQRT_SOFTPLUS = 4
"""``expert_gating_func``, llama.cpp's enum llama_expert_gating_func_type."""
_MIN_INDEX_HEAD_DIM = 64
"""Size of the smallest Hadamard matrix that llama.cpp builds for index queries and keys."""
_Q8_BLOCK = 32
_MAX_F16 = 65504.0


def _table(text: str) -> dict[str, tuple[str, bool]]:
    """Parse lines of our name, GGUF's name, and * if ``WeightType`` applies. A final dot stands for ``.weight``."""
    found = {}
    for line in text.strip().splitlines():
        ours, theirs, *mark = line.split()
        found[ours + "weight" * ours.endswith(".")] = theirs + "weight" * theirs.endswith("."), bool(mark)
    return found


# Tensors without a mark are vectors and small mixing and routing matrices, which llama.cpp keeps in F32.
_MODEL = _table("""
    embed.            token_embd.               *
    head.             output.                   *
    norm.             output_norm.
    hyper_head.fn     output_hc_fn.
    hyper_head.base   output_hc_base.
    hyper_head.scale  output_hc_scale.
""")
_BLOCK = _table("""
    attn_norm.                      attn_norm.
    ffn_norm.                       ffn_norm.
    attn_residual.fn                hc_attn_fn.
    attn_residual.base              hc_attn_base.
    attn_residual.scale             hc_attn_scale.
    ffn_residual.fn                 hc_ffn_fn.
    ffn_residual.base               hc_ffn_base.
    ffn_residual.scale              hc_ffn_scale.
    attn.wq_a.                      attn_q_a.                   *
    attn.q_norm.                    attn_q_a_norm.
    attn.wq_b.                      attn_q_b.                   *
    attn.wkv.                       attn_kv.                    *
    attn.kv_norm.                   attn_kv_a_norm.
    attn.sink                       attn_sinks.
    attn.wo_a                       attn_output_a.              *
    attn.wo_b.                      attn_output_b.              *
    attn.compressor.wkv.            attn_compressor_kv.         *
    attn.compressor.wgate.          attn_compressor_gate.       *
    attn.compressor.ape             attn_compressor_ape.
    attn.compressor.norm.           attn_compressor_norm.
    attn.indexer.wq_b.              indexer.attn_q_b.           *
    attn.indexer.weights_proj.      indexer.proj.               *
    attn.indexer.compressor.wkv.    indexer_compressor_kv.      *
    attn.indexer.compressor.wgate.  indexer_compressor_gate.    *
    attn.indexer.compressor.ape     indexer_compressor_ape.
    attn.indexer.compressor.norm.   indexer_compressor_norm.
    ffn.router.                     ffn_gate_inp.
    ffn.router_bias                 exp_probs_b.bias
    ffn.tid2eid                     ffn_gate_tid2eid.
    ffn.w1                          ffn_gate_exps.              *
    ffn.w2                          ffn_down_exps.              *
    ffn.w3                          ffn_up_exps.                *
    ffn.shared.w1.                  ffn_gate_shexp.             *
    ffn.shared.w2.                  ffn_down_shexp.             *
    ffn.shared.w3.                  ffn_up_shexp.               *
""")
_EXPERT_STACK = re.compile(r"\.ffn\.w[123]$")


@dataclass(frozen=True)
class _Source:
    """A tensor of the file: its GGUF name, our name, its shape, and whether the weight type applies to it."""

    name: str
    ours: str
    shape: tuple[int, ...]
    typed: bool


def export_gguf(model: Transformer, path: str | Path, weights: WeightType = "f32") -> None:
    """Write ``model`` to ``path``, atomically replacing an existing file.

    ``weights`` is the type of the large matrices. ``q8_0`` stores blocks of 32 values with one scale; matrices whose
    rows do not divide into blocks become F16. Norms, biases, routers and mixing weights are F32. With ``qat``, routed
    experts are rounded to FP4 first, as in the forward pass. The file has the vocabulary size but no vocabulary, and
    no multi-token prediction module (``mtp.*``).

    Raises ConfigError if the architecture cannot represent the network, the type is unknown or the package ``gguf`` is
    missing, and CheckpointError if a value is not finite, or too large for the type.
    """
    if weights not in get_args(WeightType):
        raise ConfigError(f"'{weights}' is not one of {', '.join(get_args(WeightType))}", "weights")
    check_expressible(model.config)
    try:
        from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape
        from gguf.quants import quantize
    except ImportError as error:
        raise ConfigError(
            "gguf needs the package 'gguf'; install it with pip install 'fiftyfold[gguf]'", "format"
        ) from error
    path = Path(path)
    state = model.state_dict()
    found = list(_sources(model))
    with made_parents(path), atomic_file(path) as scratch:
        writer = GGUFWriter(scratch, ARCHITECTURE)
        try:
            _add_metadata(writer, model.config, weights)
            types = {source.name: GGMLQuantizationType[_type_of(source, weights)] for source in found}
            for source in found:
                kind = types[source.name]
                size = math.prod(quant_shape_to_byte_shape(source.shape, kind))
                writer.add_tensor_info(source.name, source.shape, np.dtype(np.float32), size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for source in found:
                values = _file_values(model, state[source.ours], source).numpy()
                kind = types[source.name]
                _check_range(source, values, kind.name)
                writer.write_tensor_data(values if kind == GGMLQuantizationType.I32 else quantize(values, kind))
        finally:
            writer.close()


def check_expressible(config: ModelConfig) -> None:
    """Raise ConfigError if llama.cpp's ``deepseek4`` architecture cannot represent the network."""

    def require(ok: bool, key: str, expected: str, found: Any) -> None:
        if not ok:
            raise ConfigError(f"llama.cpp's {ARCHITECTURE} needs {expected}, found {quote(found)}", key)

    c = config
    for name in c.layers:
        require(MIXERS[name].one_key_value, "layers", "only sliding, csa and hca layers", name)
    require(c.hyper_connections, "hyper_connections", "true", c.hyper_connections)
    require(c.hc_mult == 4, "hc_mult", "4", c.hc_mult)
    require(c.ffn == "moe", "ffn", quote("moe"), c.ffn)
    for key, needed in (
        ("first_k_dense_replace", 0),
        ("scoring_func", "sqrtsoftplus"),
        ("n_group", 1),
        ("tie_word_embeddings", False),
    ):
        require(getattr(c, key) == needed, key, quote(needed), getattr(c, key))
    require(c.swiglu_limit > 0, "swiglu_limit", "a limit above 0", c.swiglu_limit)
    require(c.num_shared_experts >= 1, "num_shared_experts", "at least 1", c.num_shared_experts)
    # llama.cpp divides by zero if its index-key cache is empty, or if its hca cache is and has keys of equal width.
    require(bool(c.indexed_layers), "layers", "at least one csa layer", c.layers)
    require(c.csa_ratio == 4, "csa_ratio", "4", c.csa_ratio)
    dims = c.index_head_dim
    require(dims >= _MIN_INDEX_HEAD_DIM, "index_head_dim", f"at least {_MIN_INDEX_HEAD_DIM}", dims)
    if HeavilyCompressedAttention not in c.mixers:
        require(dims != c.head_dim, "index_head_dim", "a width other than head_dim if no layer is hca", dims)
    else:
        require(c.hca_ratio == 128, "hca_ratio", "128", c.hca_ratio)
    if c.yarn_factor > 1:
        for key, value in (("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0)):
            require(getattr(c, key) == value, key, f"{value:g}", getattr(c, key))


def _add_metadata(writer: GGUFWriter, config: ModelConfig, weights: WeightType) -> None:
    c = config
    ratios = {"sliding": 0, "csa": c.csa_ratio, "hca": c.hca_ratio}
    integers = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_positions,
        "embedding_length": c.hidden_size,
        "embedding_length_out": c.hidden_size * c.hc_mult,
        "block_count": c.num_layers,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.sliding_window": c.window,
        "attention.indexer.head_count": c.index_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "rope.dimension_count": c.rope_head_dim,
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hash_layer_count": c.num_hash_layers,
        "expert_count": c.num_experts,
        "expert_used_count": c.experts_per_token,
        "expert_shared_count": c.num_shared_experts,
        "expert_feed_forward_length": c.expert_size,
        "expert_gating_func": _SQRT_SOFTPLUS,
    }
    floats = {
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "rope.freq_base": c.rope_theta,
        "hyper_connection.epsilon": c.hc_eps,
        "expert_weights_scale": c.routed_scaling_factor,
    }
    scaling = "none"
    if c.yarn_factor > 1:
        scaling = "yarn"
        integers["rope.scaling.original_context_length"] = c.yarn_original_positions
        floats["rope.scaling.factor"] = c.yarn_factor
    for key, number in integers.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", number)
    for key, value in floats.items():
        writer.add_float32(f"{ARCHITECTURE}.{key}", value)
    writer.add_string(f"{ARCHITECTURE}.rope.scaling.type", scaling)
    writer.add_bool(f"{ARCHITECTURE}.expert_weights_norm", True)
    writer.add_array(f"{ARCHITECTURE}.attention.compress_ratios", [ratios[name] for name in c.layers])
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        writer.add_array(f"{ARCHITECTURE}.{key}", [c.swiglu_limit] * c.num_layers)
    writer.add_string("general.type", "model")
    writer.add_uint32("general.file_type", _FILE_TYPES[weights])
    writer.add_uint32("general.quantization_version", 2)
    # llama.cpp identifies pre-tokenizers by name and cannot read an arbitrary tokenizer.json; callers pass token IDs.
    writer.add_string("tokenizer.ggml.model", "none")


def _sources(model: Transformer) -> Iterator[_Source]:
    state = model.state_dict()
    for ours, tensor in state.items():
        if ours.startswith("mtp."):
            continue
        prefix, table, leaf = "", _MODEL, ours
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", ours):
            prefix, table, leaf = f"blk.{match[1]}.", _BLOCK, match[2]
        if leaf == "ffn.router_bias" and ours.replace("router_bias", "tid2eid") in state:
            continue  # unused in a hash-routed layer and absent from the format
        name, typed = table[leaf]
        shape = tuple(tensor.shape)
        if leaf == "attn.wo_a":  # ours is one matrix per group, GGUF stacks them
            shape = (shape[0] * shape[1], shape[2])
        yield _Source(prefix + name, ours, shape, typed)


def _type_of(source: _Source, weights: WeightType) -> str:
    if source.ours.endswith(".tid2eid"):
        return "I32"
    if not source.typed:
        return "F32"
    return "F16" if weights == "q8_0" and source.shape[-1] % _Q8_BLOCK else weights.upper()


def _check_range(source: _Source, values: np.ndarray, kind: str) -> None:
    """Raise CheckpointError for a value that the type would store as infinite. Scales of Q8_0 blocks are F16."""
    most = {"F16": _MAX_F16, "Q8_0": _MAX_F16 * 127}.get(kind, math.inf)
    largest = np.abs(values).max()
    if largest > most:
        raise CheckpointError(
            f"tensor '{source.ours}' holds {largest:g}, but {kind.lower()} holds values up to {most:g}; write f32"
        )


@torch.no_grad()
def _file_values(model: Transformer, tensor: Tensor, source: _Source) -> Tensor:
    """Return a tensor on the CPU, as int32 for hash tables and float32 otherwise."""
    tensor = tensor.detach().cpu().reshape(source.shape)
    if not tensor.is_floating_point():
        return tensor.int()
    tensor = tensor.float()
    if not is_finite(tensor):
        raise CheckpointError(f"tensor '{source.ours}' holds values that are not finite")
    if _EXPERT_STACK.search(source.ours):
        tensor = Precision(model.config).round_expert(tensor)
    return tensor.contiguous()
