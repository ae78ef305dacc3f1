"""Networks under test: ours and transformers' ``DeepseekV4ForCausalLM``, with equal weights and a cache each.

``transformers`` is imported lazily, so that processes of our network do not load it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from benchmarks.lib.decoding import next_logits
from benchmarks.lib.timing import Timing, fastest, format_threads
from model.cache import Cache
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.generation import prefill
from model.hf import export_pretrained, import_pretrained
from model.hf.family import OWN_KEY
from model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import DynamicCache

PRECISIONS = ("float32", "bfloat16")
OURS_DEFAULT, OURS_FASTEST = "ours, defaults", "ours, fastest"


@dataclass(frozen=True)
class Setting:
    """Precision of the weights and number of threads."""

    precision: str
    threads: int

    def __str__(self) -> str:
        return f"{self.precision}, {format_threads(self.threads)}"


DEFAULTS = Setting("float32", torch.get_num_threads())
"""Our defaults."""
DEFAULT_CHUNK = 512
"""Default chunk size of :func:`model.generation.prefill`."""


def all_settings(threads: Iterable[int]) -> list[Setting]:
    """Return the defaults and every combination of precision and thread count."""
    return list(dict.fromkeys([DEFAULTS, *itertools.starmap(Setting, itertools.product(PRECISIONS, threads))]))


def reported_settings(times: Mapping[Setting, Timing]) -> dict[str, Setting]:
    """Return the two settings of our network that tables report: the defaults and the fastest."""
    return {OURS_DEFAULT: DEFAULTS, OURS_FASTEST: fastest(times)}


class Network(Protocol):
    """Interface of the networks under test."""

    def new_cache(self, tokens: int) -> Any:
        """Return an empty cache of one sequence of up to ``tokens`` tokens."""

    def fill(self, cache: Any, tokens: int) -> None:
        """Fill an empty cache with random entries for ``tokens`` tokens."""

    def prefill(self, cache: Any, ids: Tensor, chunk: int) -> Tensor:
        """Append ids int64 [1, S] in chunks and return the last token's logits, float32 [1, vocab]."""

    def decode(self, cache: Any, ids: Tensor) -> None:
        """Append ids int64 [1, S] one token at a time."""


class OurNetwork:
    """Network of this project, loaded with :func:`model.hf.import_pretrained`, with matrices stored in ``precision``.

    The folder's config sets the cache formats; a folder saved by transformers has none and uses unrounded floats.
    """

    def __init__(self, folder: str | Path, precision: str = "float32"):
        self.model = import_pretrained(folder)
        if precision != "float32":
            self.model.cast_weights(getattr(torch, precision))

    def new_cache(self, tokens: int) -> Cache:
        return Cache(self.model.config, 1, tokens)

    def fill(self, cache: Cache, tokens: int) -> None:
        fill_random(cache, tokens)

    def prefill(self, cache: Cache, ids: Tensor, chunk: int) -> Tensor:
        return prefill(self.model, cache, ids, chunk)

    @torch.inference_mode()
    def decode(self, cache: Cache, ids: Tensor) -> None:
        for token in ids.split(1, dim=1):
            next_logits(self.model, token, cache)


class TransformersNetwork:
    """Transformers' network in ``precision``, with defaults otherwise.

    ``compiled`` applies torch.compile to the hyper-connections, whose many small operations it can fuse. Compiling the
    whole forward pass took 247 s for the first decoded token and recompiled for later ones.
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

    def new_cache(self, tokens: int) -> DynamicCache:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def fill(self, cache: DynamicCache, tokens: int) -> None:
        """Fill an empty cache with random entries for ``tokens`` tokens.

        Layers hold the window and, keyed by "compressor" and "indexer", the entries, their count, the rows of an
        incomplete block, and in csa layers the rows of the previous block.
        """
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
                entries, remaining = divmod(tokens, layer.compress_rate)
                layer.compressed_kv[name] = normal(1, entries, width)
                layer.entry_count[name] = entries
                overlap = hasattr(layer, "overlap_kv")
                for rows in (layer.buffer_kv, layer.buffer_gate):
                    rows[name] = normal(1, remaining, 2 * width if overlap else width)
                if overlap and entries:
                    layer.overlap_kv[name] = normal(1, layer.compress_rate, width)
                    # Includes a position bias, which is float32.
                    layer.overlap_gate[name] = normal(1, layer.compress_rate, width).float()

    @torch.inference_mode()
    def prefill(self, cache: DynamicCache, ids: Tensor, chunk: int) -> Tensor:
        for piece in ids.split(chunk, dim=1):
            logits = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float()

    @torch.inference_mode()
    def decode(self, cache: DynamicCache, ids: Tensor) -> None:
        for token in ids.split(1, dim=1):
            self.model(token, past_key_values=cache, use_cache=True)


def write_weights(config: ModelConfig, folder: Path) -> None:
    """Write random weights to ``folder / "rounded"`` and ``folder / "plain"``.

    :func:`model.hf.export_pretrained` writes the former, with routed experts rounded to FP4. Transformers saves the
    same weights to the latter, without our cache formats in the config.
    """
    torch.manual_seed(0)
    export_pretrained(Transformer(config.replace(zero_init_output=False)), folder / "rounded")
    network = TransformersNetwork(folder / "rounded").model
    delattr(network.config, OWN_KEY)  # transformers would save it again
    network.save_pretrained(folder / "plain")
