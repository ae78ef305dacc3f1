"""Sequence mixers, one file each behind :class:`model.mixers.base.Mixer`. A layer schedule lists names of this
table."""

from __future__ import annotations

from model.mixers.base import Mixer
from model.mixers.csa import CompressedSparseAttention
from model.mixers.dsa import DeepSeekSparseAttention
from model.mixers.gqa import GroupedQueryAttention
from model.mixers.hca import HeavilyCompressedAttention
from model.mixers.kda import KimiDeltaAttention
from model.mixers.mamba2 import Mamba2
from model.mixers.mla import MultiHeadLatentAttention
from model.mixers.sliding import SlidingWindowAttention

MIXERS: dict[str, type[Mixer]] = {
    "sliding": SlidingWindowAttention,
    "csa": CompressedSparseAttention,
    "hca": HeavilyCompressedAttention,
    "gqa": GroupedQueryAttention,
    "mamba2": Mamba2,
    "kda": KimiDeltaAttention,
    "mla": MultiHeadLatentAttention,
    "dsa": DeepSeekSparseAttention,
}
