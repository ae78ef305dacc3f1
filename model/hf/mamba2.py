"""Mamba-2: ``Mamba2ForCausalLM`` of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Size

from model.config import ModelConfig
from model.hf.config_reader import ConfigReader
from model.hf.family import ExpertFormat, Family
from model.hf.name_table import NameTable, parse_names
from model.hf.tensors import Layout, Source
from model.mixers.mamba2 import Mamba2 as Mixer

_NAMES = NameTable(
    model=parse_names("""
        embed.  backbone.embeddings.
        norm.   backbone.norm_f.
        head.   lm_head.
    """),
    block=parse_names("""
        attn_norm.      norm.
        attn.in_proj.   mixer.in_proj.
        attn.conv.      mixer.conv1d.       filters
        attn.conv.bias  mixer.conv1d.bias
        attn.A_log      mixer.A_log
        attn.D          mixer.D
        attn.dt_bias    mixer.dt_bias
        attn.norm.      mixer.norm.
        attn.out_proj.  mixer.out_proj.
    """),
    block_prefix="backbone.layers.N.",
)
_INTEGERS = ("expand", "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size")
_NUMBERS = ("time_step_min", "time_step_max")
_INFINITY = {"__float__": "Infinity"}
"""Spelling of infinity in transformers, because JSON has no infinite numbers."""
_MAX_POSITIONS = 1 << 20
"""The format has no limit, because there are no positions."""


class Mamba2(Family):
    """Blocks of a norm and a recurrent mixer."""

    title = "Mamba-2"
    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    mixers = {"linear_attention": "mamba2"}  # noqa: RUF012
    fields = {  # noqa: RUF012
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "layer_norm_epsilon": "norm_eps",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    fixed = {"use_bias": False, "hidden_act": "silu"}  # noqa: RUF012
    needs = {"hyper_connections": False, "ffn": "none"}  # noqa: RUF012
    own_fields = (*Family.own_fields, "max_positions")
    own_options = {"state_format": Mixer.name}  # noqa: RUF012

    def read_fields(self, r: ConfigReader) -> dict[str, Any]:
        r.refuse_quantization()
        options: dict[str, Any] = {key: r.integer(key) for key in _INTEGERS}
        options |= {key: r.number(key) for key in _NUMBERS}
        options["use_conv_bias"] = r.require("use_conv_bias")
        options["time_step_limit"] = _read_limit(r)
        if r.integer("hidden_size") * options["expand"] != options["num_heads"] * options["head_dim"]:
            raise r.error(
                f"key 'num_heads': {options['num_heads']} heads of head_dim {options['head_dim']} are not expand "
                f"{options['expand']} times hidden_size {r.content['hidden_size']}"
            )
        return {
            "layers": [Mixer.name] * r.layer_count(),
            "max_positions": _MAX_POSITIONS,
            "mixer_options": {Mixer.name: options},
        }

    def other_keys(self) -> Mapping[str, str]:
        names = (*_INTEGERS, *_NUMBERS, "use_conv_bias", "time_step_limit", *self.own_options)
        return {f"mixer_options.{Mixer.name}.{name}": name for name in names} | {"layers": "num_hidden_layers"}

    def write_fields(self, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
        options, shape = config.mixer_options[Mixer.name], Mixer.shape(config)
        content: dict[str, Any] = {key: options[key] for key in (*_INTEGERS, "use_conv_bias")}
        content |= {key: float(options[key]) for key in _NUMBERS}  # transformers refuses integers
        least, most = options["time_step_limit"]
        return content | {
            "num_heads": shape.num_heads,
            "expand": shape.inner // config.hidden_size,
            "time_step_limit": [float(least), _INFINITY if most is None else float(most)],
        }

    def check_expressible(self, config: ModelConfig, layout: Layout) -> None:
        super().check_expressible(config, layout)
        inner, hidden = Mixer.shape(config).inner, config.hidden_size
        key = f"mixer_options.{Mixer.name}.num_heads"
        self.require(inner % hidden == 0, key, f"a multiple of hidden_size {hidden} channels", inner)

    def sources(self, config: ModelConfig, shapes: dict[str, Size], layout: Layout) -> dict[str, Source]:
        return _NAMES.sources(shapes, layout)

    def canonical_name(self, name: str) -> str:
        return name.replace("backbone.embedding.", "backbone.embeddings.")  # the name in the authors' checkpoints


def _read_limit(r: ConfigReader) -> list[float | None]:
    """Return the limits of step sizes; None stands for infinity."""
    limits = r.items("time_step_limit")
    if len(limits) != 2:
        raise r.wrong("time_step_limit", "two numbers", limits)
    return [None if limit in (math.inf, _INFINITY) else limit for limit in limits]
