"""Decode steps that are recorded as CUDA graphs and replayed, which saves the launches of their kernels.

A recorded step is right for all lengths, because its operators take every length from tensors:

* the tokens' IDs, the sequences' lengths and their page IDs are copied into the same tensors before every replay;
* the fixed state of the sequences stays at the same addresses (:meth:`model.cache.Cache.bind_state`);
* grids cover the whole page table; kernels mask entries beyond a sequence's length.

There is one graph per batch size and width of the page table, which is a power of two. The first step for each pair of
them runs normally, which compiles kernels and times their settings; the second is recorded.
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

from kernels.triton_support.platform import can_run
from kernels.triton_support.tiles import power_of_two
from model.cache import Cache
from model.cache.pages import PagePool
from model.errors import CacheError
from model.layers.linear import Linear
from model.transformer import Transformer

_log = logging.getLogger("fiftyfold")

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Records a function without keeping its effects. Returns the tensor of its result and a function that replays it into
that tensor."""

_capture = threading.Lock()
"""PyTorch permits one capture at a time per process."""


class CudaGraphRecorder:
    """Records the kernels of functions as CUDA graphs of one GPU, which share memory: a replay overwrites other
    results."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
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
        return result, graph.replay


def unsupported_reason(model: Transformer) -> str:
    """Return why decode steps of a network cannot be recorded, or an empty string."""
    weight = next(model.parameters())
    if not weight.is_cuda:
        return f"the network is on {weight.device}"
    if not can_run(weight):
        return "the Triton kernels do not support this GPU, and operators in their place synchronize with the CPU"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is enabled, whose cached casts of weights a replay would not update"
    matrices = [m.weight for m in model.modules() if isinstance(m, Linear) and not m.full_precision]
    if any(matrix.dtype == torch.float32 for matrix in matrices):
        return "with float32 weights, attention and experts run in operators that synchronize with the CPU"
    if model.execution.batch_invariant:
        return "the batch-invariant mode computes token by token"
    for mixer in model.config.mixers:
        if not mixer.steps_have_fixed_shape:
            return f"steps of '{mixer.name}' layers depend on the lengths of the sequences"
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
    logits: Tensor | None = None
    """float32 [B, 1, vocab], once the step is recorded."""
    replay: Callable[[], object] | None = None


class DecodeGraphs:
    """Recorded decode steps of one network, for batches of up to ``max_batch`` sequences.

    The network must not change afterwards. A cache keeps its fixed state at the recorded addresses until another one is
    used. All caches must share a page pool and options. Tests without a GPU pass another ``record``.
    """

    def __init__(self, model: Transformer, max_batch: int, record: Recorder | None = None):
        self.model, self.max_batch = model, max_batch
        self._record = CudaGraphRecorder(next(model.parameters()).device) if record is None else record
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
    def if_supported(cls, model: Transformer, max_batch: int) -> DecodeGraphs | None:
        """Return recorded steps for a network on a GPU, or None. Logs the reason if a GPU cannot have them."""
        reason = unsupported_reason(model)
        if not reason:
            return cls(model, max_batch)
        if next(model.parameters()).is_cuda:
            _log.info("decoding without CUDA graphs: %s", reason)
        return None

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return sum(step.replay is not None for step in self._steps.values())

    def logits(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Append a token to every sequence, input_ids int64 [B, 1], outside training. Return the next token's logits,
        float32 [B, 1, vocab], which the next call overwrites. Raises CacheError and changes nothing if the tokens do
        not fit, for more than ``max_batch`` sequences, or for a cache of another page pool or other options."""
        if not self.records:
            return self.model(input_ids, cache)
        self._check(cache)
        cache.begin(*input_ids.shape)
        self._bind_state(cache)
        step, is_new = self._step_of(input_ids, cache)
        step.ids.copy_(input_ids)
        cache.bind_inputs(step.starts, step.page_ids)
        if step.replay is None and not is_new:
            self._try_to_record(step, cache)
        if step.replay is not None and step.logits is not None:
            step.replay()
            logits = step.logits
        else:
            logits = self._run(step.ids, cache)
        cache.advance()
        return logits

    def _check(self, cache: Cache) -> None:
        """Raise CacheError unless the recorded steps suit a cache. The first one decides about pool and options."""
        if cache.batch_size > self.max_batch:
            raise CacheError(f"recorded steps have at most {self.max_batch} sequences, found {cache.batch_size}")
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
        batch, width = len(input_ids), power_of_two(max(map(len, cache.pages)))
        is_new = (batch, width) not in self._steps
        if is_new:
            self._steps[batch, width] = _Step(
                ids=input_ids.new_zeros(batch, 1, dtype=torch.int64),
                starts=input_ids.new_zeros(batch, dtype=torch.int64),
                page_ids=input_ids.new_zeros(batch, width, dtype=torch.int64),
            )
        return self._steps[batch, width], is_new

    def _try_to_record(self, step: _Step, cache: Cache) -> None:
        """Record a step, or if that fails, give up recording."""
        batch, width = step.page_ids.shape
        try:
            step.logits, step.replay = self._record(lambda: self._run_resident(step))
        except Exception as error:  # whatever it is, later recordings would fail as well
            reason = str(error).partition("\n")[0]
            _log.warning("decoding without CUDA graphs: recording a step failed (%s: %s)", type(error).__name__, reason)
            self.records = False
            self._steps.clear()
            cache.unbind_state()
            self._fixed_state, self._resident = [], lambda: None
        else:
            _log.info("recorded a decode step of %d sequences of up to %d pages as a CUDA graph", batch, width)
            # Drop tensors cached during the capture; they live in the graph's memory.
            cache.bind_inputs(step.starts, step.page_ids)

    def _bind_state(self, cache: Cache) -> None:
        """Keep the fixed state of a cache at the recorded addresses, in place of that of the cache before it."""
        before = self._resident()
        if before is cache:
            return
        if before is not None:
            before.unbind_state()
        if not self._fixed_state:
            self._fixed_state = cache.fixed_memory(self.max_batch)
        cache.bind_state(self._fixed_state)
        self._resident = weakref.ref(cache)
