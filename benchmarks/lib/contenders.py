"""Load the same weights twice: our network, and transformers' ``DeepseekV4ForCausalLM``, each with a cache.

``transformers`` is imported where its network is made: processes that run ours alone do without.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from benchmarks.lib.timing import Timing, fastest, threads_of
from model.cache import Cache
from model.cache_filling import fill_random
from model.config import ModelConfig
from model.generation import prefill
from model.hf import export_pretrained, import_pretrained
from model.hf_config import OWN_KEY
from model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import DynamicCache

PRECISIONS = ("float32", "bfloat16")
OURS_DEFAULT, OURS_FASTEST = "ours, defaults", "ours, fastest"


@dataclass(frozen=True)
class Way:
    """Setting of a side: the precision of its weights, and its threads."""

    precision: str
    threads: int

    def __str__(self) -> str:
        return f"{self.precision}, {threads_of(self.threads)}"


DEFAULTS = Way("float32", torch.get_num_threads())
"""Setting of a user who chooses nothing."""
DEFAULT_CHUNK = 512
"""The pieces in which :func:`model.generation.prefill` reads by default."""


def ways(threads: Iterable[int]) -> list[Way]:
    """Every precision at every number of threads, and the defaults in any case."""
    return list(dict.fromkeys([DEFAULTS, *itertools.starmap(Way, itertools.product(PRECISIONS, threads))]))


def ours_at(times: Mapping[Way, Timing]) -> dict[str, Way]:
    """The two ways that a table shows of ours: the defaults, and the fastest one."""
    return {OURS_DEFAULT: DEFAULTS, OURS_FASTEST: fastest(times)}


class Network(Protocol):
    """What the benchmarks ask of both."""

    def cache(self, tokens: int) -> Any:
        """An empty cache of one sequence with room for ``tokens`` tokens."""

    def fill(self, cache: Any, tokens: int) -> None:
        """Put random entries for ``tokens`` tokens into an empty cache, as if they had been read."""

    def read(self, cache: Any, ids: Tensor, chunk: int) -> Tensor:
        """Append ids int64 [1, S] to the cache, in pieces of ``chunk``; the last token's logits, float32 [1, vocab]."""

    def decode(self, cache: Any, ids: Tensor) -> None:
        """Append ids int64 [1, S] one at a time."""


class Ours:
    """A folder read by :func:`model.hf.import_pretrained`, its matrices stored in ``precision``.

    Cache formats are those the folder notes; one that transformers saved notes none and is computed in plain floats.
    """

    def __init__(self, folder: str | Path, precision: str = "float32"):
        self.model = import_pretrained(folder)
        if precision != "float32":
            self.model.store_weights(getattr(torch, precision))

    def cache(self, tokens: int) -> Cache:
        return Cache(self.model.config, 1, tokens)

    def fill(self, cache: Cache, tokens: int) -> None:
        fill_random(cache, tokens)

    def read(self, cache: Cache, ids: Tensor, chunk: int) -> Tensor:
        return prefill(self.model, cache, ids, chunk)

    @torch.inference_mode()
    def decode(self, cache: Cache, ids: Tensor) -> None:
        for token in ids.split(1, dim=1):
            self.model(token, cache, last_only=True)


class Theirs:
    """A folder read by transformers in ``precision``, everything else at its defaults.

    ``compiled`` runs torch.compile over the hyper-connections, whose many small operations are what it can fuse. (Over
    the whole forward it took 247 s for the first decoded token and went on compiling for the next ones.)
    """

    def __init__(self, folder: str | Path, precision: str = "float32", compiled: bool = False):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.dtype = getattr(torch, precision)
        self.model = transformers.DeepseekV4ForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()
        if compiled:
            for layer in self.model.model.layers:
                layer.attn_hc.compile()
                layer.ffn_hc.compile()

    def cache(self, tokens: int) -> DynamicCache:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def fill(self, cache: DynamicCache, tokens: int) -> None:
        """Its layers keep the window, and by name ("compressor", "indexer") the entries so far, their count, the rows
        of an unfinished block, and in csa layers the rows of the block before it."""
        config = self.model.config
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        for layer in cache.layers:
            window = normal(1, 1, min(tokens, config.sliding_window - 1), config.head_dim)
            layer.lazy_initialization(window, window)
            layer.keys = layer.values = window
            layer.cumulative_length = tokens
            for name in getattr(layer, "compressed_kv", ()):
                width = config.index_head_dim if name == "indexer" else config.head_dim
                entries, left = divmod(tokens, layer.compress_rate)
                layer.compressed_kv[name] = normal(1, entries, width)
                layer.entry_count[name] = entries
                overlap = hasattr(layer, "overlap_kv")
                for rows in (layer.buffer_kv, layer.buffer_gate):
                    rows[name] = normal(1, left, 2 * width if overlap else width)
                if overlap and entries:
                    layer.overlap_kv[name] = normal(1, layer.compress_rate, width)
                    # A position bias, which stays float32, has been added to these.
                    layer.overlap_gate[name] = normal(1, layer.compress_rate, width).float()

    @torch.inference_mode()
    def read(self, cache: DynamicCache, ids: Tensor, chunk: int) -> Tensor:
        for piece in ids.split(chunk, dim=1):
            logits = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float()

    @torch.inference_mode()
    def decode(self, cache: DynamicCache, ids: Tensor) -> None:
        for token in ids.split(1, dim=1):
            self.model(token, past_key_values=cache, use_cache=True)


def write_weights(config: ModelConfig, folder: Path) -> None:
    """Random weights of a network in ``folder / "rounded"``, as :func:`model.hf.export_pretrained` writes them (routed
    experts on FP4's values), and in ``folder / "plain"`` the same as transformers saves them, with no note of formats.
    """
    torch.manual_seed(0)
    export_pretrained(Transformer(config.replace(zero_init_output=False)), folder / "rounded")
    network = Theirs(folder / "rounded").model
    delattr(network.config, OWN_KEY)  # which transformers would pass on
    network.save_pretrained(folder / "plain")
