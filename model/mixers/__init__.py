"""Sequence mixers: one file each, one interface. A layer schedule is a list of the names registered here."""

from __future__ import annotations

from model.config import ModelConfig
from model.mixers.base import Mixer
from model.mixers.csa import CompressedSparseAttention
from model.mixers.gqa import GroupedQueryAttention
from model.mixers.hca import HeavilyCompressedAttention
from model.mixers.sliding import SlidingWindowAttention

MIXERS: dict[str, type[Mixer]] = {
    "sliding": SlidingWindowAttention,
    "csa": CompressedSparseAttention,
    "hca": HeavilyCompressedAttention,
    "gqa": GroupedQueryAttention,
}


def build_mixer(name: str, config: ModelConfig, layer: int) -> Mixer:
    return MIXERS[name](config, layer)
