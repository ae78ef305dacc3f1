"""The network: embedding, layers of (mixer, feed-forward) around residual streams, head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from kernels import native
from kernels.autocast import cast, in_float32
from kernels.linear import linear
from model.block import Block
from model.cache import Cache
from model.config import ModelConfig
from model.documents import PackedDocuments
from model.errors import CacheError, ConfigError
from model.execution import Execution
from model.hyper_connections import HyperConnection, HyperHead
from model.linear import Linear
from model.mixers.base import AttentionMode, Context, Mixer
from model.mixers.compressor import Compressor
from model.mixers.sliding import SlidingWindowAttention
from model.moe import MixtureOfExperts
from model.mtp import PredictAhead
from model.norm import RMSNorm
from model.precision import Precision
from model.recompute import recomputed
from model.rope import RotaryFrequencies, Rotation
from model.telemetry import Telemetry

KEPT = {"router", "compressor", "weights_proj", "head"}
"""Parts whose matrices :meth:`Transformer.store_weights` leaves alone."""


_PLACED_TOGETHER = 16 << 20
"""Bytes of weights that are copied before their first memory is given back."""


def check_ids(input_ids: Tensor) -> None:
    """Raise ValueError unless ``input_ids`` is int64 or int32 [B, S] with at least one token."""
    if input_ids.dim() != 2 or not input_ids.numel() or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids: expected integers [B, S] with at least one token, "
            f"found {input_ids.dtype} {list(input_ids.shape)}"
        )


class Transformer(nn.Module):
    """A DeepSeek-V4-style language model (or a baseline, by its layer schedule)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self._execution = Execution()
        self._recompute = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer, layer) for layer, mixer in enumerate(config.layers))
        self.hyper_head = HyperHead(config) if config.hyper_connections else None
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(PredictAhead(config) for _ in range(config.mtp_layers))
        rope = config.rope_head_dim
        sliding = RotaryFrequencies(rope, config.rope_theta)
        compressed = RotaryFrequencies(rope, config.compress_rope_theta, config)
        self._frequencies = {
            "sliding": sliding,
            "csa": compressed,
            "hca": compressed,
            "gqa": RotaryFrequencies(config.head_dim, config.rope_theta),
        }
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        attention: AttentionMode = "sparse",
        telemetry: Telemetry | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Next-token logits, float32 [B, S, vocab] ([B, 1, vocab] with ``last_only``), for input_ids int64 [B, S].

        With a cache the tokens follow those it holds and are appended to it, in pieces of any size; without, they are
        whole sequences. ``attention="dense"`` is the curriculum's warm-up and works without a cache only.

        ``positions`` int64 [B, S] packs several documents into a row, without a cache: each token's place in its own
        document, 0 where one starts, -1 for padding. Nothing is pooled, attended to or counted across a start.

        Raises CacheError, before anything is changed, when the tokens do not fit the cache; ValueError for arguments
        that do not go together.
        """
        if cache is not None:
            if cache.config is not self.config and cache.config != self.config:
                raise CacheError("the cache was made for another model configuration")
            if attention != "sparse":
                raise ValueError("attention: a cache serves sparse attention only")
            if telemetry is not None and telemetry.predict_ahead:
                raise ValueError("telemetry.predict_ahead: works on whole sequences, without a cache")
            if positions is not None:
                raise ValueError("positions: a cache takes the tokens as they follow, not packed documents")
        if attention not in get_args(AttentionMode):
            raise ValueError(f"attention: '{attention}' is not one of {', '.join(get_args(AttentionMode))}")
        check_ids(input_ids)
        if positions is not None and (positions.shape != input_ids.shape or positions.is_floating_point()):
            raise ValueError(
                f"positions: expected integers {list(input_ids.shape)}, found {positions.dtype} {list(positions.shape)}"
            )
        if cache is None and self.execution.batch_invariant and not self.training:
            if positions is not None or telemetry is not None or attention != "sparse":
                raise ValueError(
                    "execution: batch-invariant mode knows no packed documents, telemetry or dense attention"
                )
            cache = Cache(self.config, input_ids.shape[0], input_ids.shape[1], input_ids.device)
        try:  # before anything is changed
            embedding = cast(self.embed(input_ids), torch.float32)
        except IndexError:
            self.check_vocabulary(input_ids)
            raise
        if cache is not None:
            cache.begin(*input_ids.shape)
        context = self._context(input_ids, cache, positions, attention, telemetry)

        streams = self.into_streams(embedding)
        for layer, block in enumerate(self.layers):
            kept = cache.layers[layer] if cache is not None else None
            streams = self._through(block, block, context, streams, input_ids, context, kept)
        if cache is not None:
            cache.advance()
        if telemetry is not None and telemetry.predict_ahead:
            telemetry.mtp_logits = self._predict_ahead(streams, embedding, input_ids, positions, context)
        if last_only and streams.shape[1] > 1:
            streams = streams[:, -1:]
        return context.execution.tokenwise(Transformer.leave_streams, self, streams)

    def check_vocabulary(self, input_ids: Tensor) -> None:
        """Raise ValueError for an id that is no token's."""
        least, most = int(input_ids.min()), int(input_ids.max())
        if least < 0 or most >= self.config.vocab_size:
            raise ValueError(f"input_ids: {least} to {most} do not all lie in a vocabulary of {self.config.vocab_size}")

    def into_streams(self, embedding: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, n, hidden], n equal residual streams (unchanged without hyper-connections)."""
        if not self.config.hyper_connections:
            return embedding
        # Copies, not views: a CPU's library takes a token's streams as a matrix that lies whole in memory.
        return embedding.unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)

    def leave_streams(self, streams: Tensor) -> Tensor:
        """The last layer's streams to logits, float32 [B, S, vocab]."""
        return self._logits(self.norm(self.hyper_head(streams) if self.hyper_head is not None else streams))

    def _context(
        self,
        input_ids: Tensor,
        cache: Cache | None,
        positions: Tensor | None,
        attention: AttentionMode,
        telemetry: Telemetry | None,
    ) -> Context:
        documents = PackedDocuments(positions) if positions is not None else None
        if documents is not None:
            places = documents.positions
        else:
            starts = cache.starts if cache is not None else torch.zeros(1, dtype=torch.int64, device=input_ids.device)
            places = starts.unsqueeze(-1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        execution = Execution() if self.training else self.execution
        rotation = execution.tokenwise(Transformer.rotation_at, self, places)
        return Context(places, rotation, attention, telemetry, documents, execution)

    def rotation_at(self, places: Tensor) -> dict[str, Rotation]:
        """For positions int64 [B or 1, S], by mixer name."""
        names = {*self.config.layers, *(["sliding"] if self.mtp else [])}
        families = {self._frequencies[name] for name in names}
        found = {family: family.at(places) for family in families}
        return {name: found[self._frequencies[name]] for name in names}

    def _logits(self, x: Tensor) -> Tensor:
        with in_float32(x):
            return linear(x, cast(self.head.weight, torch.float32))

    def _predict_ahead(
        self, streams: Tensor, embedding: Tensor, input_ids: Tensor, positions: Tensor | None, context: Context
    ) -> Tensor:
        """Logits [B, S - 1, vocab]: at token t those of token t + 2. At a document's last token they mean nothing."""
        if not self.mtp:
            raise ValueError("telemetry.predict_ahead: the model has no module for it (mtp_layers is 0)")
        module = self.mtp[0]
        assert isinstance(module, PredictAhead)
        if input_ids.shape[1] < 2:
            raise ValueError("telemetry.predict_ahead: needs whole sequences of at least 2 tokens")
        kept = None if positions is None else positions[:, :-1]
        context = self._context(input_ids[:, :-1], None, kept, context.attention, context.telemetry)
        arguments = streams[:, :-1], embedding[:, 1:], input_ids[:, 1:], context
        return self._logits(self._through(module, module.hidden, context, *arguments))

    def _through(
        self, layer: nn.Module, function: Callable[..., Tensor], context: Context, *arguments: object
    ) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(layer, function, context.telemetry, *arguments)
        return function(*arguments)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights afresh: normal with ``init_std``, norms one, sinks, biases and position biases zero.

        On the meta device, where a model has shapes only, there is nothing to draw.
        """
        if self.embed.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, HyperConnection | HyperHead):
                module.reset()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=self.config.init_std)
            elif isinstance(module, MixtureOfExperts):
                module.reset(self.config.init_std)
            elif isinstance(module, Compressor):
                module.ape.zero_()
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 2)
            if last[-1] == "wo_a":
                parameter.normal_(std=self.config.init_std)
            elif last[-1] == "sink":
                parameter.zero_()
            if self.config.zero_init_output and (last[-2] in ("wo_b", "wo", "w2") or last[-1] == "w2"):
                parameter.zero_()

    @property
    def recompute(self) -> bool:
        """Whether the backward pass of training computes layers again instead of keeping what they made. Where it does
        not, it still computes the residual streams between a layer's halves again."""
        return self._recompute

    @recompute.setter
    def recompute(self, layers: bool) -> None:
        self._recompute = layers
        for block in self.modules():
            if isinstance(block, Block):  # one thing at a time: what it spares, the layer would keep for it
                block.recomputes_streams = not layers

    @property
    def execution(self) -> Execution:
        """How forward passes outside training are computed. Set another one at any time; ConfigError where this
        network's sizes or this machine do not allow it."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if not isinstance(execution, Execution):
            raise ValueError(f"execution: expected an Execution, such as Execution(mode=...), found {execution!r}")
        execution.check(self.config)
        self._execution = execution

    @torch.no_grad()
    def store_weights(self, dtype: torch.dtype) -> None:
        """Keep the matrices of attention and feed-forward in ``dtype``: BF16 halves them. For inference, and in place.

        Experts that are rounded to FP4 lose nothing. Router, compressors, the indexer's head weights, the head,
        hyper-connections, norms and embedding stay as they are: what they decide is worth its bytes.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"store_weights: expected a floating-point type, found {dtype}")
        with torch.inference_mode(False):  # inference tensors could not be replaced later
            for name, module in self.named_modules():
                if isinstance(module, MixtureOfExperts):
                    for stack in ("w1", "w3", "w2"):
                        weight = module.precision.round_expert(getattr(module, stack))
                        setattr(module, stack, nn.Parameter(weight.to(dtype), requires_grad=False))
                    module.rounded = True
                elif isinstance(module, SlidingWindowAttention):
                    module.wo_a = nn.Parameter(module.wo_a.to(dtype), requires_grad=False)
                elif isinstance(module, Linear) and KEPT.isdisjoint(name.split(".")):
                    module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
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

    def adopt(self, config: ModelConfig) -> None:
        """Go on with the same weights in another configuration, which differs in ``index_topk`` and ``qat`` alone.

        Raises ConfigError for any other difference.
        """
        expected = self.config.replace(index_topk=config.index_topk, qat=config.qat)
        if config != expected:
            raise ConfigError("model: weights can go on with another index_topk or qat only")
        for module in self.modules():
            if isinstance(module, Transformer | Mixer | MixtureOfExperts):
                module.config = config
            if isinstance(module, Mixer | MixtureOfExperts):
                module.precision = Precision(config)
            if isinstance(module, MixtureOfExperts):
                module.forget_rounded()

    def rounded_tensors(self) -> dict[str, int]:
        """How many tensors were rounded in training since the last call, by role: main, index, gqa, experts."""
        counts: Counter[str] = Counter()
        for module in self.modules():
            if isinstance(module, Mixer | MixtureOfExperts):
                counts += module.precision.rounded
                module.precision.rounded.clear()
        return dict(counts)

    def moe_layers(self) -> list[MixtureOfExperts]:
        return [block.ffn for block in (*self.layers, *self.mtp) if isinstance(block.ffn, MixtureOfExperts)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Parameters that hold several independent projections, one above the other, and the rows of each: the two
        series of an overlapping compressor, and what enters, leaves and mixes the residual streams."""
        found: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Compressor) and module.overlap:
                found |= {f"{name}.{part}.weight": (module.width, module.width) for part in ("wkv", "wgate")}
            elif isinstance(module, HyperConnection):
                n = self.config.hc_mult
                found[f"{name}.fn"] = (n, n, n * n)
        return found

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
