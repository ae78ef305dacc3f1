"""Decode steps that are recorded as CUDA graphs and replayed: a step of a small batch is bound by its kernel launches.

A recorded step is right for all lengths, because its operators take every length from tensors:

* the tokens' IDs, the sequences' lengths and their page IDs are copied into the same tensors before every replay;
* the fixed state of the sequences stays at the same addresses (:meth:`model.cache.Cache.move_into`);
* work whose amount depends on lengths is bounded by the page table, and kernels skip what does not exist.

There is one graph per batch size and width of the page table, which is a power of two. The first step of either runs as
usual, which compiles kernels and times their settings; the second is recorded.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.autocast import product_dtype
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


class CudaGraphRecorder:
    """Records the kernels of functions as CUDA graphs, which share memory: a replay overwrites other results."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


def fault(model: Transformer) -> str:
    """Return why decode steps of a network cannot be recorded, or an empty string."""
    weight = next(model.parameters())
    if not weight.is_cuda:
        return f"the network is on {weight.device}"
    if not can_run(weight):
        return "the Triton kernels do not support this GPU, and the operators that replace them wait for the CPU"
    matrices = [m.weight for m in model.modules() if isinstance(m, Linear) and not m.full_precision]
    if any(product_dtype(matrix) == torch.float32 for matrix in matrices):
        return "with float32 weights, attention and experts run in operators that wait for the CPU"
    if model.execution.batch_invariant:
        return "the batch-invariant mode computes token by token"
    for mixer in model.config.mixers:
        if not mixer.steps_ignore_lengths:
            return f"steps of '{mixer.name}' layers depend on the lengths of the sequences"
    return ""


def decode_graphs(model: Transformer, max_batch: int) -> DecodeGraphs | None:
    """Return recorded steps for a network on a GPU, or None. Logs the reason if a GPU cannot have them."""
    reason = fault(model)
    if not reason:
        return DecodeGraphs(model, max_batch)
    if next(model.parameters()).is_cuda:
        _log.info("decoding without CUDA graphs: %s", reason)
    return None


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
    used. All caches must share a page pool. Tests without a GPU pass another ``record``.
    """

    def __init__(self, model: Transformer, max_batch: int, record: Recorder | None = None):
        self.model, self.max_batch = model, max_batch
        self._record = CudaGraphRecorder() if record is None else record
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._fixed_state: list[Tensor] = []
        self._pool: PagePool | None = None
        self._resident: Callable[[], Cache | None] = lambda: None
        self.records = True
        """False after a failed recording. Steps then run as usual."""

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return sum(step.replay is not None for step in self._steps.values())

    def logits(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Append a token to every sequence, input_ids int64 [B, 1], outside training. Return the next token's logits,
        float32 [B, 1, vocab], which the next call overwrites. Raises CacheError if the tokens do not fit, or for a
        cache of another page pool."""
        if not self.records:
            return self.model(input_ids, cache)
        self._pool = self._pool or cache.pool
        if cache.pool is not self._pool:
            raise CacheError("recorded steps use the page pool of the first cache, this one has another")
        cache.begin(*input_ids.shape)
        self._move_in(cache)
        step, is_new = self._step_of(input_ids, cache)
        step.ids.copy_(input_ids)
        cache.place(step.starts, step.page_ids)
        if step.replay is None and not is_new:
            self._try_to_record(step, cache)
        if step.replay is not None and step.logits is not None:
            step.replay()
            logits = step.logits
        else:
            logits = self._run(step)
        cache.advance()
        return logits

    def _run(self, step: _Step) -> Tensor:
        cache = self._resident()
        assert cache is not None
        return self.model.logits(self.model.read_begun(step.ids, cache))

    def _step_of(self, input_ids: Tensor, cache: Cache) -> tuple[_Step, bool]:
        """Return the step for a cache, and whether it is new."""
        width = power_of_two(max(map(len, cache.pages)))
        key = len(input_ids), width, cache.pool.pages  # a pool that grows moves its rows
        is_new = key not in self._steps
        if is_new:
            integers = input_ids.new_zeros(len(input_ids), 2 + width, dtype=torch.int64)
            ids, starts, page_ids = (part.clone() for part in integers.split((1, 1, width), dim=1))
            self._steps[key] = _Step(ids, starts[:, 0], page_ids)
        return self._steps[key], is_new

    def _try_to_record(self, step: _Step, cache: Cache) -> None:
        batch, width = step.page_ids.shape
        try:
            step.logits, step.replay = self._record(lambda: self._run(step))
        except RuntimeError as error:
            self.records = False
            self._steps.clear()
            _log.warning("decoding without CUDA graphs: recording a step failed (%s)", str(error).partition("\n")[0])
        else:
            _log.info("recorded a decode step of %d sequences of up to %d pages as a CUDA graph", batch, width)
        cache.place(step.starts, step.page_ids)  # without tensors of the recording

    def _move_in(self, cache: Cache) -> None:
        """Keep the fixed state of a cache at the recorded addresses, in place of that of the cache before it."""
        before = self._resident()
        if before is cache:
            return
        if before is not None:
            before.move_out()
        if not self._fixed_state:
            self._fixed_state = cache.fixed_memory(self.max_batch)
        cache.move_into(self._fixed_state)
        self._resident = weakref.ref(cache)
