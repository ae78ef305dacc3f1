"""The mixed-precision cache: packed compressed entries, plus a fixed-size state per sequence.

Growing parts hold one packed row per entry, allocated for whole pages of ``lcm(csa_ratio, hca_ratio)`` tokens. The
fixed state is the sliding window (packed like entries) and, per compressor, the projected rows of tokens that do not
fill a block yet. What is read back equals what training's fake quantisation produced, bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, pack, unpack
from model.config import ModelConfig
from model.errors import CacheError
from model.precision import Precision, gqa_format

COMPONENTS = ("csa", "hca", "index", "gqa", "window", "tail")


class PackedEntries:
    """Rows that grow with the sequence: uint8 [B, capacity, layout.nbytes], the first ``length`` in use."""

    def __init__(self, batch_size: int, capacity: int, layout: EntryLayout, device: torch.device):
        self.layout = layout
        self.data = torch.zeros(batch_size, capacity, layout.nbytes, dtype=torch.uint8, device=device)
        self.length = 0

    def append(self, x: Tensor) -> None:
        """x float [B, n, size]."""
        self.data[:, self.length : self.length + x.shape[1]] = pack(x, self.layout)
        self.length += x.shape[1]

    def read(self) -> Tensor:
        """All rows in use: float32 [B, length, size]."""
        return unpack(self.data[:, : self.length], self.layout)

    def gather(self, indices: Tensor) -> Tensor:
        """Rows int64 [B, S, k], unpacked to float32 [B, S, k, size]. Only these rows are touched."""
        if not self.length:
            return torch.zeros(*indices.shape[:2], 0, self.layout.size, device=indices.device)
        batch = torch.arange(indices.shape[0], device=indices.device).view(-1, 1, 1)
        return unpack(self.data[batch, indices], self.layout)

    @property
    def storages(self) -> list[Tensor]:
        return [self.data]


class WindowState:
    """The last ``window`` tokens' packed key-values: uint8 [B, window, layout.nbytes], newest last."""

    def __init__(self, batch_size: int, window: int, layout: EntryLayout, device: torch.device):
        self.layout = layout
        self.data = torch.zeros(batch_size, window, layout.nbytes, dtype=torch.uint8, device=device)
        self.length = 0

    def append(self, x: Tensor) -> None:
        """x float [B, n, size]; older rows fall out."""
        window = self.data.shape[1]
        rows = pack(x[:, -window:], self.layout)
        self.data = torch.cat((self.data[:, rows.shape[1] :], rows), dim=1)
        self.length = min(window, self.length + x.shape[1])

    def read(self, most: int) -> Tensor:
        """Up to ``most`` newest tokens: float32 [B, n, size]."""
        n = min(most, self.length)
        return unpack(self.data[:, self.data.shape[1] - n :], self.layout)

    @property
    def storages(self) -> list[Tensor]:
        return [self.data]


class TailState:
    """Projected rows (values and gates) of the tokens that an overlap or an unfinished block still needs, float32."""

    def __init__(self, batch_size: int, capacity: int, width: int, device: torch.device):
        self.data = torch.zeros(batch_size, capacity, width, device=device)
        self.length = 0

    def read(self) -> Tensor:
        """[B, length, width]."""
        return self.data[:, : self.length].clone()

    def write(self, rows: Tensor, keep: int) -> None:
        """Keep the last ``keep`` of rows [B, n, width]."""
        self.data[:, :keep] = rows[:, rows.shape[1] - keep :]
        self.length = keep

    @property
    def storages(self) -> list[Tensor]:
        return [self.data]


@dataclass
class LayerCache:
    """One layer's share. Which parts exist depends on its mixer; a mixer only touches its own."""

    mixer: str
    parts: dict[str, PackedEntries | WindowState | TailState]

    @property
    def window(self) -> WindowState:
        return self.parts["window"]  # type: ignore[return-value]

    @property
    def entries(self) -> PackedEntries:
        return self.parts["entries"]  # type: ignore[return-value]

    @property
    def index(self) -> PackedEntries:
        return self.parts["index"]  # type: ignore[return-value]

    @property
    def tail(self) -> TailState:
        return self.parts["tail"]  # type: ignore[return-value]

    @property
    def index_tail(self) -> TailState:
        return self.parts["index_tail"]  # type: ignore[return-value]

    def component_of(self, part: str) -> str:
        if part == "entries":
            return self.mixer
        return "tail" if part == "index_tail" else part


class Cache:
    """State of ``batch_size`` sequences of equal length, for :class:`model.transformer.Transformer`.

    Room for ``max_tokens`` is allocated at once. Raises CacheError when that exceeds the model's positions.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_tokens: int, device: str | torch.device = "cpu"):
        if batch_size < 1 or max_tokens < 1:
            raise CacheError(f"a cache needs at least 1 sequence and 1 token, asked for {batch_size} and {max_tokens}")
        if max_tokens > config.max_positions:
            raise CacheError(f"{max_tokens} tokens exceed the model's max_positions of {config.max_positions}")
        self.config = config
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.length = 0
        self.layers = [
            _layer_cache(config, name, batch_size, max_tokens, torch.device(device)) for name in config.layers
        ]

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raise CacheError unless [batch_size, tokens] more ids fit."""
        if batch_size != self.batch_size:
            raise CacheError(f"the cache holds {self.batch_size} sequences, the input has {batch_size}")
        if self.length + tokens > self.max_tokens:
            raise CacheError(
                f"{tokens} more tokens do not fit: the cache holds {self.length} of at most {self.max_tokens}"
            )

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += tokens

    def nbytes(self, component: str | None = None) -> int:
        """Bytes of the real storages: all, or one of :data:`COMPONENTS`."""
        if component is not None and component not in COMPONENTS:
            raise CacheError(f"component '{component}' is not one of {', '.join(COMPONENTS)}")
        return sum(
            storage.untyped_storage().nbytes()
            for layer in self.layers
            for name, part in layer.parts.items()
            if component in (None, layer.component_of(name))
            for storage in part.storages
        )

    def bytes_per_token(self) -> float:
        """All bytes of one sequence, fixed state included, over the tokens there is room for."""
        return self.nbytes() / self.batch_size / self.max_tokens

    def fork(self) -> Cache:
        """An independent copy: both may go on from here."""
        return copy.deepcopy(self)

    def truncate(self, tokens: int) -> None:
        """Go back to the first ``tokens`` tokens.

        Packed entries allow any length, but the window and the tails keep only the newest tokens: layers that have
        them can stay where they are or be emptied. Raises CacheError otherwise, and for lengths not held.
        """
        if not 0 <= tokens <= self.length:
            raise CacheError(f"cannot truncate to {tokens} tokens: the cache holds {self.length}")
        if tokens == self.length:
            return
        if tokens and any(layer.mixer != "gqa" for layer in self.layers):
            raise CacheError(
                f"cannot truncate from {self.length} to {tokens} tokens: the sliding window and the compressors' tails "
                "keep only the newest tokens, so they can be emptied but not wound back"
            )
        for layer in self.layers:
            for part in layer.parts.values():
                part.length = tokens
        self.length = tokens


def _layer_cache(config: ModelConfig, mixer: str, batch_size: int, max_tokens: int, device: torch.device) -> LayerCache:
    precision = Precision(config)
    # Whole pages, so that every ratio divides what is allocated.
    tokens = -(-max_tokens // config.page_tokens) * config.page_tokens
    parts: dict[str, PackedEntries | WindowState | TailState] = {}
    if mixer == "gqa":
        layout = EntryLayout(2 * config.num_kv_heads * config.head_dim, gqa_format(config))
        parts["entries"] = PackedEntries(batch_size, max_tokens, layout, device)
        return LayerCache(mixer, parts)
    parts["window"] = WindowState(batch_size, config.window, precision.main_layout, device)
    if mixer != "sliding":
        ratio = config.compress_ratio(mixer)
        parts["entries"] = PackedEntries(batch_size, tokens // ratio, precision.main_layout, device)
        parts["tail"] = _tail(batch_size, ratio, config.head_dim, overlap=mixer == "csa", device=device)
    if mixer == "csa":
        ratio = config.csa_ratio
        parts["index"] = PackedEntries(batch_size, tokens // ratio, precision.index_layout, device)
        parts["index_tail"] = _tail(batch_size, ratio, config.index_head_dim, overlap=True, device=device)
    return LayerCache(mixer, parts)


def _tail(batch_size: int, ratio: int, width: int, overlap: bool, device: torch.device) -> TailState:
    """Room for the rows of an unfinished block and, with overlap, of the whole block before it."""
    rows = 2 * ratio - 1 if overlap else ratio - 1
    return TailState(batch_size, rows, 2 * (2 * width if overlap else width), device)
