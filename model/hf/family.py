"""The interface of a checkpoint family: the networks of one ``model_type``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Size

from model.config import CACHE_FORMATS, ModelConfig
from model.errors import ConfigError
from model.hf.config_reader import ConfigReader
from model.hf.tensors import Layout, Source
from model.wording import quote

OWN_KEY = "fiftyfold"
"""Key for fields without a published counterpart, :attr:`Family.own_fields`."""
ExpertFormat = Literal["fp4", "fp8"]


class Family:
    """Conversion between ModelConfig and ``config.json``, and between our and the published tensor names.

    A family is one module of :mod:`model.hf` and a line in :data:`model.hf.registry.FAMILIES`. Code outside asks the
    family and does not branch on its type.
    """

    title: ClassVar[str]
    """The network's name in messages."""
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    """The class in transformers."""
    mixers: ClassVar[Mapping[str, str]]
    """The mixers that layers can have, by their name in ``layer_types``."""
    layouts: ClassVar[tuple[Layout, ...]] = ("transformers",)
    """The layouts that can be written. The first one is the default."""
    head: ClassVar[str] = "lm_head.weight"
    """Canonical name of the head's weight, of which folders with tied embeddings may hold a copy."""
    has_prediction_module: ClassVar[bool] = False
    """True if the format holds our multi-token prediction module."""
    fields: ClassVar[Mapping[str, str]]
    """Keys of config.json that map directly to one of our fields. All are required, and all are written."""
    fixed: ClassVar[Mapping[str, Any]]
    """Keys of which the network implements one value, which is also the default in transformers."""
    needs: ClassVar[Mapping[str, Any]]
    """Fields of ModelConfig that must have one value, because the format cannot express another."""

    own_fields: ClassVar[tuple[str, ...]] = (*CACHE_FORMATS, "qat")
    """Fields of ModelConfig under :data:`OWN_KEY`."""
    own_options: ClassVar[Mapping[str, str]] = {}
    """Options of mixers under :data:`OWN_KEY`, and the mixer of each."""

    # --- configuration

    def read_config(self, r: ConfigReader, **overrides: Any) -> ModelConfig:
        """Return the configuration that a config.json describes, with fields of ModelConfig replaced by ``overrides``.

        Raises CheckpointError naming the key if the network does not implement its value.
        """
        r.fixed(self.fixed)
        fields: dict[str, Any] = {ours: r.require(key) for key, ours in self.fields.items()}
        fields |= dict(self.needs) | self.read_fields(r)
        self._add_own(r, fields)
        names = {ours: key for key, ours in self.fields.items()} | dict(self.other_keys())
        return r.build({**fields, **overrides}, {ours: key for ours, key in names.items() if ours not in overrides})

    def _add_own(self, r: ConfigReader, fields: dict[str, Any]) -> None:
        """Add the fields and options under :data:`OWN_KEY`."""
        own, known = r.content.get(OWN_KEY, {}), (*self.own_fields, *self.own_options)
        if not isinstance(own, dict) or set(own) - set(known):
            raise r.wrong(OWN_KEY, f"an object of {', '.join(known)}", own)
        for name, value in own.items():
            if name in self.own_options:
                fields["mixer_options"].setdefault(self.own_options[name], {})[name] = value
            else:
                fields[name] = value

    def read_fields(self, r: ConfigReader) -> dict[str, Any]:
        """Return the fields of ModelConfig that :attr:`fields` and :attr:`needs` leave open."""
        raise TypeError(f"{type(self).__name__} defines no read_fields")

    def other_keys(self) -> Mapping[str, str]:
        """Return the keys, by our field or option, that :meth:`read_fields` reads, for messages."""
        return {}

    def write_config(self, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
        """Return the content of ``config.json``. ``experts`` is the stored format of routed experts if quantized."""
        content: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        content |= {key: getattr(config, ours) for key, ours in self.fields.items()} | dict(self.fixed)
        own = {name: getattr(config, name) for name in self.own_fields}
        for name, mixer in self.own_options.items():
            if mixer in config.mixer_options:
                own[name] = config.mixer_options[mixer][name]
        content[OWN_KEY] = own
        # Without a padding token, transformers would take a default that need not be in the vocabulary.
        content |= {"num_hidden_layers": config.num_layers, "use_cache": True, "pad_token_id": None}
        return content | self.write_fields(config, layout, experts)

    def write_fields(self, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
        """Return the keys for the fields that :attr:`fields` leaves open."""
        raise TypeError(f"{type(self).__name__} defines no write_fields")

    def check_expressible(self, config: ModelConfig, layout: Layout) -> None:
        """Raise ConfigError if a checkpoint in ``layout`` cannot describe the network."""
        for name in config.layers:
            known = ", ".join(self.mixers.values())
            self.require(name in self.mixers.values(), "layers", f"layers of {known} only", name)
        if not self.has_prediction_module:
            self.require(config.mtp_layers == 0, "mtp_layers", "0", config.mtp_layers)
        for field, value in self.needs.items():
            found = getattr(config, field)
            self.require(found == value, field, quote(value), found)

    def require(self, ok: bool, key: str, expected: str, found: Any) -> None:
        """Raise ConfigError for the field ``key`` unless ``ok``."""
        if not ok:
            raise ConfigError(f"{key}: a {self.title} checkpoint needs {expected}, found {quote(found)}")

    # --- tensors

    def detect_layout(self, names: Iterable[str]) -> Layout:
        """Return the layout of a folder with tensors of these names."""
        return "transformers"

    def sources(self, config: ModelConfig, shapes: dict[str, Size], layout: Layout) -> dict[str, Source]:
        """Return all tensors of a checkpoint in ``layout`` by name, for a model with tensors of these shapes."""
        raise TypeError(f"{type(self).__name__} defines no sources")

    def canonical_name(self, name: str) -> str:
        """Return one name for all variants of a tensor's name."""
        return name

    def drafts(self, names: Iterable[str], config: ModelConfig) -> set[str]:
        """Return those canonical names that belong to draft modules, which predict further tokens."""
        return set()
