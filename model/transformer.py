"""The network: embedding, layers of (mixer, feed-forward) around residual streams, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from kernels import native
from kernels.autocast import cast, in_float32
from kernels.linear import linear
from model.activation_checkpointing import checkpointed
from model.batch_invariant import check_widths
from model.block import Block
from model.cache import Cache
from model.config import ModelConfig
from model.errors import CacheError, ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import AttentionMode, Context
from model.forward.execution import Execution, in_tiles
from model.forward.input_ids import check_ids
from model.forward.packing import PackedDocuments
from model.layers.hyper_connections import HyperConnection, HyperHead
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import RotaryFrequencies, Rotation
from model.mixers.base import Mixer
from model.moe import MixtureOfExperts
from model.mtp import PredictAhead

_PLACED_TOGETHER = 16 << 20
"""Bytes of weights that are copied before their old memory is freed."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing meta tensors imports torch._dynamo, which takes seconds
            super().reset_parameters()


class Transformer(nn.Module):
    """A DeepSeek-V4-style language model, or a baseline, depending on its layer schedule.

    Three properties reconfigure a network in place: :attr:`config`, :attr:`execution` and
    :attr:`activation_checkpointing`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config = config
        self._execution = Execution()
        self._activation_checkpointing = False
        self.embed = _Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer, layer) for layer, mixer in enumerate(config.layers))
        self.hyper_head = HyperHead(config) if config.hyper_connections else None
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, full_precision=True)
        )
        self.mtp = nn.ModuleList(PredictAhead(config) for _ in range(config.mtp_layers))
        families = {mixer.name: mixer.rotary(config) for mixer in config.block_mixers}
        self._rotary = {name: family for name, family in families.items() if family is not None}
        self._frequencies = {family: RotaryFrequencies(family) for family in self._rotary.values()}
        self.reset_parameters()

    @classmethod
    def on_meta(cls, config: ModelConfig) -> Transformer:
        """Return a network whose tensors have shapes but no memory. Raises ConfigError for tensors too large for
        torch's 64-bit sizes."""
        try:
            with torch.device("meta"):
                return cls(config)
        except (RuntimeError, TypeError) as error:
            if "overflow" not in str(error).lower():
                raise
            raise ConfigError("model: a tensor of these sizes would exceed 2 ** 63 bytes") from error

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        attention: AttentionMode = "sparse",
        aux: AuxOutputs | None = None,
        last_only: bool = False,
        forced_experts: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Return next-token logits, float32 [B, S, vocab], for input_ids int64 [B, S].

        Args:
            cache: holds the tokens before these, which are appended to it, in pieces of any size. Without a cache the
                tokens are whole sequences.
            positions: int64 [B, S] packs several documents into a row, without a cache: each token's position in its
                document, 0 at a start, -1 for padding. Nothing is pooled, attended to or counted across a start.
            attention: ``dense`` is the curriculum's warm-up and works without a cache only.
            aux: receives auxiliary losses, metrics and counts.
            last_only: return the logits of the last token only, [B, 1, vocab].
            forced_experts: int64 [B, S, K] by layer, experts to use instead of the router's choice.

        Raises CacheError, before anything is changed, if the tokens do not fit the cache; ValueError for arguments that
        exclude each other.
        """
        self._check_arguments(input_ids, cache, positions, attention, aux)
        if cache is None and self.execution.batch_invariant and not self.training:
            if positions is not None or aux is not None or attention != "sparse":
                raise ValueError(
                    "execution: batch-invariant mode has no packed documents, auxiliary outputs or dense attention"
                )
            cache = Cache(self.config, input_ids.shape[0], input_ids.shape[1], input_ids.device)
        embedding = self.embed_tokens(input_ids)
        if cache is not None:
            cache.begin(*input_ids.shape)
        context = self._context(input_ids, cache, positions, attention, aux, forced_experts)
        streams = self._run_layers(input_ids, embedding, context, cache)
        if cache is not None:
            cache.advance()
        if aux is not None and aux.predict_ahead:
            aux.mtp_logits = self._predict_ahead(streams, embedding, input_ids, positions, context)
        return self.logits(streams[:, -1:] if last_only and streams.shape[1] > 1 else streams)

    def read(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Append input_ids int64 [B, S] to ``cache``, outside training. Return the last layer's streams, the input of
        :meth:`logits`: float32 [B, S, n, hidden], without hyper-connections [B, S, hidden]. Raises as
        :meth:`forward`."""
        self._check_arguments(input_ids, cache, None, "sparse", None)
        embedding = self.embed_tokens(input_ids)
        cache.begin(*input_ids.shape)
        streams = self._run_layers(input_ids, embedding, self._context(input_ids, cache), cache)
        cache.advance()
        return streams

    def read_begun(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Run the layers over tokens for which ``cache.begin`` was called; the caller calls ``advance``. Return as
        :meth:`read`."""
        return self._run_layers(input_ids, self.embed_tokens(input_ids), self._context(input_ids, cache), cache)

    def read_ahead(self, streams: Tensor, next_ids: Tensor, cache: Cache, starts: list[int]) -> Tensor:
        """Run the multi-token prediction module over tokens at positions ``starts`` and following, outside training.

        Args:
            streams: The network's streams of these tokens, from :meth:`read`. For tokens that the network has not read,
                the module's own streams of the tokens before them.
            next_ids: int64 [B, S], the token after each of these tokens.
            cache: A cache with ``predicts_ahead``. Only the module's rows change.
            starts: First position of each sequence.

        Returns:
            The module's streams, the input of :meth:`ahead_logits`.
        """
        module = self._prediction_module()
        with cache.at(starts, next_ids.shape[1]):
            context = replace(self._context(next_ids, cache), execution=Execution())  # drafts may differ in any bit
            return module.extend(streams, self.embed_tokens(next_ids), next_ids, context, cache.ahead)

    def ahead_logits(self, streams: Tensor) -> Tensor:
        """Return logits [B, S, vocab] of the token after the next one, for streams of :meth:`read_ahead`."""
        return self.project(self._prediction_module().combine(streams))

    def _prediction_module(self) -> PredictAhead:
        if not self.mtp:
            raise ValueError("the model has no multi-token prediction module (mtp_layers is 0)")
        module = self.mtp[0]
        assert isinstance(module, PredictAhead)
        return module

    def _run_layers(self, input_ids: Tensor, embedding: Tensor, context: Context, cache: Cache | None) -> Tensor:
        streams = self._into_streams(embedding)
        for layer, block in enumerate(self.layers):
            layer_cache = cache.layers[layer] if cache is not None else None
            streams = self._run_layer(block, context, streams, input_ids, context, layer_cache)
        return streams

    def check_vocabulary(self, input_ids: Tensor) -> None:
        """Raise ValueError if an id is outside the vocabulary."""
        least, most = (int(x) for x in input_ids.aminmax())
        if least < 0 or most >= self.config.vocab_size:
            raise ValueError(f"input_ids: {least} to {most} do not all lie in a vocabulary of {self.config.vocab_size}")

    def check_step(self, input_ids: Tensor, cache: Cache) -> None:
        """Check the arguments of a step outside training. Raises ValueError unless input_ids is integers [B, S], on a
        CPU also for an ID outside the vocabulary; CacheError for a cache of another configuration."""
        self._check_arguments(input_ids, cache, None, "sparse", None)
        if input_ids.is_cpu:  # on another device, this would wait for it
            self.check_vocabulary(input_ids)

    def _check_arguments(
        self,
        input_ids: Tensor,
        cache: Cache | None,
        positions: Tensor | None,
        attention: AttentionMode,
        aux: AuxOutputs | None,
    ) -> None:
        if cache is not None:
            if cache.config is not self.config and cache.config != self.config:
                raise CacheError("the cache was made for another model configuration")
            if attention != "sparse":
                raise ValueError("attention: a cache serves sparse attention only")
            if aux is not None and aux.predict_ahead:
                raise ValueError("aux.predict_ahead: works on whole sequences, without a cache")
            if positions is not None:
                raise ValueError("positions: packed documents cannot be combined with a cache")
        if attention not in get_args(AttentionMode):
            raise ValueError(f"attention: '{attention}' is not one of {', '.join(get_args(AttentionMode))}")
        check_ids(input_ids)
        if positions is not None and (positions.shape != input_ids.shape or positions.dtype != torch.int64):
            raise ValueError(
                f"positions: expected int64 {list(input_ids.shape)}, found {positions.dtype} {list(positions.shape)}"
            )

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Return embeddings, float32 [B, S, hidden]. Raises ValueError for an id outside the vocabulary."""
        try:
            return cast(self.embed(input_ids), torch.float32)
        except IndexError:
            self.check_vocabulary(input_ids)
            raise

    def _into_streams(self, embedding: Tensor) -> Tensor:
        """Copy [B, S, hidden] to n equal streams [B, S, n, hidden]; without hyper-connections return it unchanged."""
        if not self.config.hyper_connections:
            return embedding
        # Copies, not views: the CPU library takes a token's streams as one contiguous matrix.
        return embedding.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()

    def logits(self, streams: Tensor) -> Tensor:
        """Return logits, float32 [B, S, vocab], for the last layer's streams."""
        if self.execution.batch_invariant and not self.training:
            return in_tiles(self._logits, streams)
        return self._logits(streams)

    def _logits(self, streams: Tensor) -> Tensor:
        return self.project(self.norm(self.hyper_head(streams) if self.hyper_head is not None else streams))

    def project(self, x: Tensor) -> Tensor:
        """Return logits for the input of the output head, [B, S, hidden]."""
        weight = self.embed.weight if self.head is None else self.head.weight
        with in_float32(x):
            return linear(x, cast(weight, torch.float32))

    def _context(
        self,
        input_ids: Tensor,
        cache: Cache | None,
        positions: Tensor | None = None,
        attention: AttentionMode = "sparse",
        aux: AuxOutputs | None = None,
        forced_experts: Mapping[int, Tensor] | None = None,
    ) -> Context:
        documents = PackedDocuments(positions) if positions is not None else None
        if documents is not None:
            places = documents.positions
        else:
            starts = cache.starts if cache is not None else torch.zeros(1, dtype=torch.int64, device=input_ids.device)
            places = starts.unsqueeze(-1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        execution = Execution() if self.training else self.execution
        rotation = in_tiles(self._rotations, places) if execution.batch_invariant else self._rotations(places)
        return Context(places, rotation, attention, aux, documents, forced_experts or {}, execution)

    def _rotations(self, positions: Tensor) -> dict[str, Rotation]:
        """Return the rotations at positions int64 [B or 1, S] by mixer name."""
        found = {family: frequencies.at(positions) for family, frequencies in self._frequencies.items()}
        return {name: found[family] for name, family in self._rotary.items()}

    def _predict_ahead(
        self, streams: Tensor, embedding: Tensor, input_ids: Tensor, positions: Tensor | None, context: Context
    ) -> Tensor:
        """Return logits [B, S - 1, vocab] at token t of token t + 2. At a document's last token they are arbitrary."""
        module = self._prediction_module()
        if input_ids.shape[1] < 2:
            raise ValueError("aux.predict_ahead: needs whole sequences of at least 2 tokens")
        kept = None if positions is None else positions[:, :-1]
        context = self._context(input_ids[:, :-1], None, kept, context.attention, context.aux, context.forced_experts)
        arguments = streams[:, :-1], embedding[:, 1:], input_ids[:, 1:], context
        return self.project(self._run_layer(module.hidden, context, *arguments))

    def _run_layer(self, layer: Callable[..., Tensor], context: Context, *arguments: object) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpointed(layer, context.aux, *arguments)
        return layer(*arguments)

    # --- weights

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all weights: normal with ``init_std``; norms one; sinks, biases and position biases zero.

        On the meta device, where a model has shapes only, this does nothing.
        """
        if self.embed.weight.is_meta:
            return
        std = self.config.init_std
        self.embed.weight.normal_(std=std)
        modules = [module for module in self.modules() if hasattr(module, "init_weights")]
        # Mixers come last: the order of random draws decides what a seed gives.
        for module in sorted(modules, key=lambda module: isinstance(module, Mixer)):
            module.init_weights(std)  # type: ignore[operator]
        if self.config.zero_init_output:
            for block in (*self.layers, *self.mtp):
                block.attn.zero_output()
                if block.ffn is not None:
                    block.ffn.zero_output()

    @torch.no_grad()
    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast the matrices of attention and feed-forward blocks to ``dtype``, in place, for inference. BF16 halves
        them.

        Experts rounded to FP4 lose nothing. Routers, compressors, index head weights, the head, hyper-connections,
        norms and the embedding keep their precision.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"cast_weights: expected a floating-point type, found {dtype}")
        with torch.inference_mode(False):  # inference tensors could not be replaced later
            for module in self.modules():
                if module is not self and hasattr(module, "cast_weights"):
                    module.cast_weights(dtype)  # type: ignore[operator]
        self.place_weights()

    @torch.no_grad()
    def place_weights(self) -> None:
        """Move the weights to huge pages, where a CPU reads them up to twice as fast. In place, for inference."""
        some: list[nn.Parameter] = []
        replaceable = [p for p in self.parameters() if not p.is_inference()]
        for parameter in [*replaceable, None]:  # None: the end
            if parameter is not None:
                some.append(parameter)
                if sum(p.nbytes for p in some) < _PLACED_TOGETHER:
                    continue
            for placed, copy in zip(some, native.in_huge_pages([p.data.contiguous() for p in some])):
                placed.data = copy
            some = []

    # --- reconfiguration

    @property
    def config(self) -> ModelConfig:
        """The configuration. Setting another one continues with the same weights; ConfigError if it differs in more
        than ``index_topk`` and ``qat``."""
        return self._config

    @config.setter
    def config(self, config: ModelConfig) -> None:
        if config != self.config.replace(index_topk=config.index_topk, qat=config.qat):
            raise ConfigError("model: only index_topk and qat can change on an existing model")
        self._config = config
        for module in self.modules():
            if hasattr(module, "set_config"):
                module.set_config(config)  # type: ignore[operator]

    @property
    def execution(self) -> Execution:
        """Execution mode of forward passes outside training. Setting it raises ConfigError if the layers or widths of
        the network do not allow the mode."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if not isinstance(execution, Execution):
            raise ValueError(f"execution: expected an Execution, such as Execution(mode=...), found {execution!r}")
        if execution.batch_invariant:
            check_widths(self.config)
        self._execution = execution

    @property
    def activation_checkpointing(self) -> bool:
        """True if the backward pass recomputes whole layers instead of keeping their activations. Otherwise it
        recomputes the residual streams between a layer's halves only."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, layers: bool) -> None:
        self._activation_checkpointing = layers
        for block in (*self.layers, *self.mtp):
            block.recompute_streams = not layers  # recomputing both would keep the streams that one of them frees

    # --- parts

    def moe_layers(self) -> list[MixtureOfExperts]:
        return [block.ffn for block in (*self.layers, *self.mtp) if isinstance(block.ffn, MixtureOfExperts)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters that stack several independent projections, and the rows of each projection. Muon
        treats each as a matrix."""
        found: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Mixer | HyperConnection):
                found |= {f"{name}.{parameter}": rows for parameter, rows in module.split_sizes().items()}
        return found

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
