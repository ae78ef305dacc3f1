"""The interface of a sequence mixer: its declarations, and its three steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from model.cache.parts import CachePart
from model.errors import ConfigError
from model.forward.context import Context
from model.layers.rope import Rotary, Rotation, Yarn
from model.precision import Precision
from model.work import Work

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


class StoredFormat(NamedTuple):
    """A tensor role of one layer, its storage format, and its number of tensors per forward pass."""

    role: str
    format: str
    tensors: int


class Mixer(nn.Module):
    """Mixes the tokens of a layer.

    The class declares what the rest of the system asks of a mixer: configuration checks, rotary positions, cache parts,
    formats and costs. It is registered in :data:`model.mixers.MIXERS`. Code outside :mod:`model.mixers` asks the
    class and does not branch on its name.

    A forward pass has three steps. :meth:`project` and :meth:`output` treat every token alone, :meth:`mix` does not.
    """

    name: ClassVar[str]
    """The mixer's name in ``model.layers``."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Fields of ``model.mixer_options.<name>`` with their defaults."""
    formats: ClassVar[tuple[str, ...]] = ()
    """Configuration fields with the storage formats of the mixer's cache parts."""
    batch_invariant_widths: ClassVar[tuple[str, ...] | None] = None
    """Configuration fields or options of the mixer whose widths products sum over; None if the mixer has no
    batch-invariant mode."""
    one_key_value: ClassVar[bool] = False
    """True if each token has one vector that is key and value for all heads."""

    # --- declarations

    @classmethod
    def check_options(cls, options: Mapping[str, Any], key: str) -> None:
        """Raise ConfigError for a value that is wrong in every configuration. Called even if no layer uses the mixer.

        ``options`` has every option. ``key`` precedes their names in messages.
        """

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise ConfigError if the configuration does not allow this mixer. :meth:`check_options` has passed."""

    @classmethod
    def check_length(cls, config: ModelConfig, tokens: int) -> None:
        """Raise ConfigError if sequences of ``tokens`` tokens would leave part of the mixer unused."""

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary | None:
        """Return the rotary family of the mixer's positions."""
        return None

    @classmethod
    def indexer_ratio(cls, config: ModelConfig) -> int | None:
        """Return the tokens per entry that the mixer's indexer scores; None without an indexer."""
        return None

    @classmethod
    def steps_have_fixed_shape(cls, config: ModelConfig, device: str) -> bool:
        """Return whether, after :meth:`model.cache.Cache.bind_inputs`, a step of one token per sequence runs the same
        operators at the same shapes for all lengths, on devices of type ``device``, such as ``cpu``."""
        return False

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        """Return the parts of the layer's cache by attribute name."""
        raise TypeError(f"{cls.__name__} defines no cache_parts")

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        """Return the tensor roles that the precision settings cover."""
        return []

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        """Return the work of one layer for the ``tokens``-th token of a sequence. See :mod:`model.costs` for the
        rule."""
        raise TypeError(f"{cls.__name__} defines no work")

    # --- the layer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.set_config(config)

    def set_config(self, config: ModelConfig) -> None:
        """Switch to another configuration with the same parameter shapes."""
        self.config = config
        self.precision = Precision(config)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """Mix tokens x [B, S, hidden] to [B, S, hidden]. An output depends on its token and earlier ones only.

        Without a ``cache`` the tokens are whole sequences. With one they follow the tokens it holds, and their state is
        appended.
        """
        rotation = context.rotation.get(self.name)
        projected = self.project(x, rotation, context, cached=cache is not None)
        return self.output(self.mix(projected, context, cache), rotation)

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Any:
        """Project x [B, S, hidden] to the inputs of :meth:`mix`, a tuple of tensors [B, S, ...]."""
        raise TypeError(f"{type(self).__name__} defines no project")

    def mix(self, projected: Any, context: Context, cache: LayerCache | None) -> Tensor:
        """Mix the tokens: float32 [B, S, ...]."""
        raise TypeError(f"{type(self).__name__} defines no mix")

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        """Project the mixed tokens back to [B, S, hidden]."""
        raise TypeError(f"{type(self).__name__} defines no output")

    def init_weights(self, std: float) -> None:
        """Initialize the parameters that belong to no submodule with ``init_weights`` of its own."""

    def zero_output(self) -> None:
        """Zero the weights of the last projection."""
        raise TypeError(f"{type(self).__name__} defines no zero_output")

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast matrices that belong to no submodule to ``dtype``, for inference."""

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters that stack several independent projections, and the rows of each projection."""
        return {}


def yarn_of(config: ModelConfig, attention_factor: float = 1.0) -> Yarn | None:
    """Return the configuration's YaRN scaling, if any."""
    c = config
    if c.yarn_factor == 1:
        return None
    return Yarn(c.yarn_factor, c.yarn_original_positions, c.yarn_beta_fast, c.yarn_beta_slow, attention_factor)


def require(condition: bool, reason: str, field: str) -> None:
    """Raise ConfigError about ``field`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(reason, field)
