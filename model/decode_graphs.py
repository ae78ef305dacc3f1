"""Decode steps that are recorded and replayed: without Python on a CPU, and as CUDA graphs on a GPU.

A recorded step is right for all lengths, because its operators take every length from tensors:

* the tokens' IDs, the sequences' lengths and their page IDs are copied into the same tensors before every replay;
* the fixed state of the sequences stays at the same addresses (:meth:`model.cache.Cache.bind_state`);
* grids of GPU kernels cover the whole page table; kernels mask entries beyond a sequence's length.

There is one recording per batch size and width of the page table, which is a power of two. The first step for each pair
of them runs normally, which packs weights, compiles kernels and times their settings; the second is recorded.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import fused_experts, native
from kernels.linear import supports_weight
from kernels.native.recording import Recorded, record
from kernels.triton_support.platform import can_run
from kernels.triton_support.tiles import power_of_two
from model.cache import Cache
from model.cache.pages import PagePool
from model.errors import CacheError
from model.layers.linear import Linear
from model.transformer import Transformer

_log = logging.getLogger("fiftyfold")

Recorder = Callable[[Callable[[], Tensor]], Recorded]
"""Runs a function once and records it."""

_capture = threading.Lock()
"""PyTorch permits one capture at a time per process."""


class CudaGraphRecorder:
    """Records the kernels of functions as CUDA graphs of one GPU, which share memory: a replay overwrites other
    results."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Tensor]) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        # A memory pool cannot be used again after all of its graphs were deleted.
        pool = next((other.pool() for other in self._graphs), None)
        with (
            _capture,
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = function()
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return result

        return Recorded(replay(), replay)  # a capture runs nothing


def unsupported_reason(model: Transformer) -> str:
    """Return why decode steps of a network cannot be recorded, or an empty string."""
    weight = next(model.parameters())
    if not weight.is_cuda and not weight.is_cpu:
        return f"the network is on {weight.device}"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is enabled, whose cached casts of weights a replay would not update"
    if model.execution.batch_invariant:
        return "the batch-invariant mode computes token by token"
    if weight.is_cpu and native.level() is None:
        return "native CPU operators are not available"
    if weight.is_cpu and not all(supports_weight(layer.w1) for layer in model.moe_layers()):
        return "the native operators read expert weights in float32 and BF16 only"
    if weight.is_cuda and (reason := _unsupported_on_gpu(model)):
        return reason
    for mixer in dict.fromkeys(model.config.mixers):
        if not mixer.steps_have_fixed_shape(model.config, weight.device.type):
            return f"steps of '{mixer.name}' layers depend on the lengths of the sequences"
    return ""


def _unsupported_on_gpu(model: Transformer) -> str:
    if not can_run(next(model.parameters())):
        return "the Triton kernels do not support this GPU, and operators in their place synchronize with the CPU"
    matrices = [m.weight for m in model.modules() if isinstance(m, Linear) and not m.full_precision]
    if any(matrix.dtype == torch.float32 for matrix in matrices):
        return "with float32 weights, attention and experts run in operators that synchronize with the CPU"
    return ""


@dataclass
class _Step:
    """Inputs of a step at fixed addresses, and the recorded step."""

    ids: Tensor
    """int64 [B, 1]"""
    starts: Tensor
    """int64 [B]"""
    page_ids: Tensor
    """int64 [B, width]"""
    replay: Callable[[], Tensor] | None = None
    """Returns logits, float32 [B, 1, vocab]. None until the step is recorded."""


class DecodeGraphs:
    """Recorded decode steps of one network, for batches of up to ``max_batch`` sequences.

    The network must not change afterwards. A cache keeps its fixed state at the recorded addresses until another one is
    used. All caches must share a page pool and options. Not thread-safe. Tests pass another ``recorder``.
    """

    def __init__(self, model: Transformer, max_batch: int, recorder: Recorder | None = None):
        device = next(model.parameters()).device
        self.model, self.max_batch = model, max_batch
        if recorder is None:
            recorder = record if device.type == "cpu" else CudaGraphRecorder(device)
        self._record = recorder
        self._steps: dict[tuple[int, int], _Step] = {}
        """By batch size and width of the page table."""
        self._pages = 0
        """Pages of the pool whose rows the steps use. A pool that grows moves its rows."""
        self._fixed_state: list[Tensor] = []
        self._pool: PagePool | None = None
        self._options: dict[str, Any] = {}
        self._resident: Callable[[], Cache | None] = lambda: None
        self.records = True
        """False after a failed recording. Steps then run normally."""

    @classmethod
    def if_supported(cls, model: Transformer, max_batch: int, cuda_graphs: bool = True) -> DecodeGraphs | None:
        """Return recorded steps for a network, or None if it cannot have them or is on a GPU and ``cuda_graphs`` is
        False. Logs the reason for a GPU. On a CPU, ``max_batch`` is limited: the experts of many tokens run in
        operators whose shapes depend on the router."""
        device = next(model.parameters()).device.type
        if device == "cuda" and not cuda_graphs:
            return None
        reason = unsupported_reason(model)
        if not reason:
            return cls(model, min(max_batch, fused_experts.MAX_TOKENS) if device == "cpu" else max_batch)
        if device == "cuda":
            _log.info("decode steps are not recorded: %s", reason)
        return None

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return sum(step.replay is not None for step in self._steps.values())

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Append a token to every sequence, input_ids int64 [B, 1]. Return the next token's logits, float32
        [B, 1, vocab], which the next call may overwrite. Steps of more than ``max_batch`` sequences run normally.

        Raises the errors of :meth:`Transformer.check_step`, ValueError for more than one token per sequence, and
        CacheError if the tokens do not fit or for a cache of another page pool or other options. Nothing is changed
        then.
        """
        self.model.check_step(input_ids, cache)
        if input_ids.shape[1] != 1:
            raise ValueError(f"input_ids: expected one token per sequence, found {list(input_ids.shape)}")
        if not self.records or cache.batch_size > self.max_batch:
            return self.model(input_ids, cache)
        self._check(cache)
        cache.begin(*input_ids.shape)
        self._bind_state(cache)
        step, is_new = self._step_of(input_ids, cache)
        step.ids.copy_(input_ids)
        cache.bind_inputs(step.starts, step.page_ids)
        if step.replay is not None:
            logits = step.replay()
        elif is_new:
            logits = self._run(step.ids, cache)
        else:
            logits = self._record_step(step, cache)
        cache.advance()
        return logits

    def _check(self, cache: Cache) -> None:
        """Raise CacheError unless the recorded steps suit a cache. The first one decides about pool and options."""
        if self._pool is None:
            self._pool, self._options = cache.pool, cache.options
        if cache.pool is not self._pool or cache.options != self._options:
            raise CacheError("recorded steps use the page pool, rewind and predicts_ahead of the first cache")

    def _run(self, ids: Tensor, cache: Cache) -> Tensor:
        return self.model.logits(self.model.read_begun(ids, cache))

    def _run_resident(self, step: _Step) -> Tensor:
        cache = self._resident()
        assert cache is not None
        return self._run(step.ids, cache)

    def _step_of(self, input_ids: Tensor, cache: Cache) -> tuple[_Step, bool]:
        """Return the step for a cache, and whether it is new."""
        if cache.pool.pages != self._pages:
            self._steps.clear()
            self._pages = cache.pool.pages
        batch, width = len(input_ids), power_of_two(cache.max_pages)
        is_new = (batch, width) not in self._steps
        if is_new:
            self._steps[batch, width] = _Step(
                ids=input_ids.new_zeros(batch, 1, dtype=torch.int64),
                starts=input_ids.new_zeros(batch, dtype=torch.int64),
                page_ids=input_ids.new_zeros(batch, width, dtype=torch.int64),
            )
        return self._steps[batch, width], is_new

    def _record_step(self, step: _Step, cache: Cache) -> Tensor:
        """Run a step and record it. If that fails, give up recording."""
        batch, width = step.page_ids.shape
        try:
            recorded = self._record(lambda: self._run_resident(step))
        except Exception as error:  # whatever it is, later recordings would fail as well
            reason = str(error).partition("\n")[0]
            self._stop_recording(cache, f"recording a step failed ({type(error).__name__}: {reason})")
            return self._run(step.ids, cache)
        if recorded.replay is None:
            self._stop_recording(cache, recorded.refusal)
            return recorded.result
        step.replay = recorded.replay
        _log.debug("recorded a decode step of %d sequences of up to %d pages", batch, width)
        # Drop tensors cached while recording; on a GPU they live in the graph's memory.
        cache.bind_inputs(step.starts, step.page_ids)
        return recorded.result

    def _stop_recording(self, cache: Cache, reason: str) -> None:
        _log.warning("decode steps are not recorded: %s", reason)
        self.records = False
        self._steps.clear()
        cache.unbind_state()
        self._fixed_state, self._resident = [], lambda: None

    def _bind_state(self, cache: Cache) -> None:
        """Keep the fixed state of a cache at the recorded addresses, in place of that of the cache before it."""
        before = self._resident()
        if before is cache and cache.bound_to is self._fixed_state:
            return
        if before is not None and before.bound_to is self._fixed_state:
            before.unbind_state()
        if not self._fixed_state:
            self._fixed_state = cache.fixed_memory(self.max_batch)
        cache.bind_state(self._fixed_state)
        self._resident = weakref.ref(cache)
