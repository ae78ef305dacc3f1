"""The ``config.json`` of DeepSeek-V4 in transformers and in DeepSeek's release."""

from __future__ import annotations

import json
import math
from typing import Any

from model.config import ModelConfig
from model.hf.config_reader import ConfigReader
from model.hf.family import ExpertFormat
from model.hf.rope import flat_scaling, flat_theta, read_yarn, write_yarn
from model.hf.tensors import Layout

_ROPES = ("main", "compress")
"""Kinds of layers in nested ``rope_parameters``."""
MIXERS = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def read_fields(r: ConfigReader) -> dict[str, Any]:
    """Return the fields that keys do not map to directly."""
    fields: dict[str, Any] = {}
    fields["layers"], fields["csa_ratio"], fields["hca_ratio"] = _schedule(r)
    fields["num_hash_layers"] = _hash_layers(r, len(fields["layers"]))
    fields["rope_head_dim"] = _rope_dim(r)
    fields |= _rope(r)
    if r.number("swiglu_limit") <= 0:
        raise r.wrong("swiglu_limit", "a number above 0", r.content["swiglu_limit"])
    drafts = r.integer("num_nextn_predict_layers", default=0)
    if drafts < 0:
        raise r.wrong("num_nextn_predict_layers", "0 or more", drafts)
    fields["mtp_layers"] = min(drafts, 1)  # whether the module is this network's is decided by its tensors
    _check_quantization(r)
    return fields


def _schedule(r: ConfigReader) -> tuple[list[str], int, int]:
    """Return mixers, csa ratio and hca ratio from ``layer_types`` or the released ``compress_ratios``."""
    count = r.layer_count()
    ratios = {"csa": 4, "hca": 128}
    for key, value in r.mapping("compress_rates").items():
        if MIXERS.get(key) not in ratios:
            raise r.wrong("compress_rates", "the two compressed layer types", key)
        ratios[MIXERS[key]] = value
    for name in ratios:  # an older name that transformers still reads
        ratios[name] = r.content.get(f"compress_rate_{name}", ratios[name])
    for name, ratio in ratios.items():
        if type(ratio) is not int:
            raise r.wrong("compress_rates", f"a whole number for {name}", ratio)
    if r.has("layer_types"):
        layers = [MIXERS[name] for name in r.one_per_layer("layer_types", count, tuple(MIXERS))]
        if r.has("compress_ratios"):
            _check_agreement(r, [{"sliding": 0, **ratios}[name] for name in layers])
        return layers, ratios["csa"], ratios["hca"]
    if not r.has("compress_ratios"):
        # transformers has a default schedule that matches neither release.
        raise r.missing("layer_types", "compress_ratios")
    entries = _compress_ratios(r, count)
    # In the released code, ratio 4 overlaps and has an indexer; other ratios do not.
    first_layer: dict[int, int] = {}
    for layer, ratio in enumerate(entries):
        if ratio not in (0, 4):
            first_layer.setdefault(ratio, layer)
    if len(first_layer) > 1:
        found = " and ".join(f"{ratio} (first at layer {layer})" for ratio, layer in first_layer.items())
        raise r.error(
            f"key 'compress_ratios': expected 0 or 1 (uncompressed), 4, and at most one other ratio, found {found}"
        )
    layers = [{0: "sliding", 4: "csa"}.get(ratio, "hca") for ratio in entries]
    return layers, 4, next(iter(first_layer), ratios["hca"])


def _check_agreement(r: ConfigReader, expected: list[int]) -> None:
    for layer, (ratio, ours) in enumerate(zip(_compress_ratios(r, len(expected)), expected)):
        if ratio != ours:
            raise r.wrong(f"compress_ratios[{layer}]", f"{ours} as in 'layer_types' and 'compress_rates'", ratio)


def _compress_ratios(r: ConfigReader, count: int) -> list[int]:
    """Return the ratio of each layer, 0 for uncompressed layers, which may also be written as 1. Entries after the
    layers belong to draft modules, which are uncompressed."""
    entries = r.items("compress_ratios")
    for layer, ratio in enumerate(entries):
        if type(ratio) is not int or ratio < 0:
            raise r.wrong(f"compress_ratios[{layer}]", "a whole number of tokens per entry", ratio)
    entries = [0 if ratio == 1 else ratio for ratio in entries]
    sizes = f"key 'compress_ratios': has {len(entries)} entries, but 'num_hidden_layers' is {count}"
    if len(entries) < count:
        raise r.error(f"{sizes}; add the ratio of every layer, or correct 'num_hidden_layers'")
    for layer, ratio in enumerate(entries[count:], start=count):
        if ratio:
            raise r.error(
                f"{sizes}: entry {layer} (from 0) is {ratio}, and entries after the layers must be 0, for draft "
                "modules; remove it, or correct 'num_hidden_layers'"
            )
    return entries[:count]


def _hash_layers(r: ConfigReader, count: int) -> int:
    if not r.has("mlp_layer_types"):
        return min(r.integer("num_hash_layers"), count)
    return r.leading("mlp_layer_types", count, "hash_moe", "moe")


def _rope_dim(r: ConfigReader) -> int:
    """Return the rotary dims per head from ``qk_rope_head_dim`` and ``partial_rotary_factor``, which must agree."""
    found: dict[str, Any] = {}
    if r.has("qk_rope_head_dim"):
        found["qk_rope_head_dim"] = r.integer("qk_rope_head_dim")
    rope = r.mapping("rope_parameters")
    places = {"": r.content, "rope_parameters.": rope}
    places |= {f"rope_parameters.{name}.": rope[name] for name in _ROPES if isinstance(rope.get(name), dict)}
    for inside, mapping in places.items():
        if mapping.get("partial_rotary_factor") is not None:
            factor = r.number("partial_rotary_factor", mapping, inside)
            found[f"{inside}partial_rotary_factor"] = int(r.integer("head_dim") * factor)
    if not found:
        raise r.missing("qk_rope_head_dim", "partial_rotary_factor")
    (first, value), *others = found.items()
    for key, other in others:
        if other != value:
            raise r.wrong(key, f"{value} rotary dims as in '{first}'", other)
    return value


def _rope(r: ConfigReader) -> dict[str, Any]:
    """Return rotary bases and YaRN fields from ``rope_parameters``, nested or flat, or the released ``rope_scaling``.

    Flat ``rope_parameters`` hold the scaling of compressed layers. They may hold the bases, too, which are otherwise
    top-level keys.
    """
    rope = r.mapping("rope_parameters")
    if any(name in rope for name in _ROPES):
        for name in _ROPES:
            if not isinstance(rope.get(name), dict):
                raise r.wrong(f"rope_parameters.{name}", "an object, as for the other kind of layers", rope.get(name))
        main, compress, inside = rope["main"], rope["compress"], "rope_parameters.compress."
        kind = main.get("rope_type", "default")
        if kind != "default":
            raise r.wrong("rope_parameters.main.rope_type", '"default"', kind)
        thetas = {
            "rope_theta": r.number("rope_theta", main, "rope_parameters.main."),
            "compress_rope_theta": r.number("rope_theta", compress, inside),
        }
    else:
        compress, inside = flat_scaling(r)
        # With flat scaling, both implementations use the attention factor 1.0.
        compress = {"attention_factor": 1.0, **compress}
        thetas = {key: flat_theta(r, key) for key in ("rope_theta", "compress_rope_theta")}
    yarn = read_yarn(r, compress, inside)
    # If a nested mapping has no attention factor, transformers uses 0.1 ln(factor) + 1.
    if yarn and compress.get("attention_factor") != 1.0:
        raise r.wrong(f"{inside}attention_factor", "1.0", compress.get("attention_factor"))
    return thetas | yarn


def _check_quantization(r: ConfigReader) -> None:
    quantization = r.mapping("quantization_config")
    if not quantization:
        return
    for key, expected in QUANTIZATION.items():
        if quantization.get(key, expected) != expected:
            raise r.wrong(f"quantization_config.{key}", json.dumps(expected), quantization[key])
    experts = quantization.get("expert_dtype", r.content.get("expert_dtype"))
    if experts not in (None, "fp4", "fp8"):
        raise r.wrong("expert_dtype", '"fp4" or "fp8"', experts)


def write_fields(config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
    """Return the keys for the fields that keys do not map to directly."""
    c = config
    content: dict[str, Any] = {"num_nextn_predict_layers": c.mtp_layers}
    content |= {"rope_theta": c.rope_theta, "compress_rope_theta": c.compress_rope_theta}
    content["qk_rope_head_dim"] = c.rope_head_dim
    yarn = write_yarn(c)
    types = {ours: name for name, ours in MIXERS.items()}
    schedule: dict[str, Any] = {
        "layer_types": [types[name] for name in c.layers],
        "compress_rates": {types["csa"]: c.csa_ratio, types["hca"]: c.hca_ratio},
    }
    if layout == "transformers":
        factor = _rotary_factor(c)
        main = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": factor}
        compress = {**main, "rope_theta": c.compress_rope_theta}
        if yarn:
            compress |= {"rope_type": "yarn", "attention_factor": 1.0, **yarn}
        hashed = c.num_hash_layers
        return (
            content
            | schedule
            | {
                "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (c.num_layers - hashed),
                "partial_rotary_factor": factor,
                "rope_parameters": {"main": main, "compress": compress},
            }
        )
    ratio_of = {"sliding": 0, "csa": c.csa_ratio, "hca": c.hca_ratio}
    content |= {
        "compress_ratios": [ratio_of[name] for name in c.layers] + [0] * c.mtp_layers,
        "num_hash_layers": c.num_hash_layers,
        "expert_dtype": experts,
        "quantization_config": QUANTIZATION,
        "torch_dtype": "bfloat16",
    }
    if yarn:
        content["rope_scaling"] = {"type": "yarn", **yarn}
    if c.hca_ratio != 128:
        content |= schedule  # transformers only recognizes the released ratios without a schedule
    return content


def _rotary_factor(config: ModelConfig) -> float:
    """Return the rotary share of a head's dims, such that ``int(head_dim * factor)`` restores the dims."""
    factor = config.rope_head_dim / config.head_dim
    while int(config.head_dim * factor) < config.rope_head_dim:
        factor = math.nextafter(factor, 1.0)
    return factor
