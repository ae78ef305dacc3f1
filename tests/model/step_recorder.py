"""A stand-in for CUDA graphs on a CPU: records the operators and kernel launches of a function with the very tensors
that they read and write, and replays them. Kernels run in Triton's interpreter.

Like a CUDA graph it repeats what Python computed during the recording. What a GPU cannot record raises RuntimeError:
synchronizing with the CPU, and reading a tensor that is neither resident nor a result of the recording, such as one
made from a Python list.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from kernels.native.recording import Recorded

SYNCHRONIZING = {
    "aten::_local_scalar_dense",
    "aten::_unique",
    "aten::_unique2",
    "aten::allclose",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
}
"""Operators that return a value to the CPU, or a tensor whose shape depends on values."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MASKS = (torch.bool, torch.uint8)


def synchronizes(name, args, kwargs):
    """Return whether an operator synchronizes with the CPU on a GPU, because of its result or the shape of that."""
    if name in INDEXING:  # args: the tensor, the indices of its dims
        return any(index is not None and index.dtype in MASKS for index in args[1])
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return name in SYNCHRONIZING


def tensors_in(*values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def address(x):
    return x.untyped_storage().data_ptr()


class StepRecorder:
    """A :data:`model.decode_graphs.Recorder`. The functions ``resident`` and ``state`` return tensors with fixed
    addresses. Those of ``state`` get their values back after the recording, because a GPU runs nothing while it
    records."""

    def __init__(self, resident, state):
        self._resident, self._state = resident, state
        self.recorded = 0

    def __call__(self, function):
        before = [(x, x.clone()) for x in self._state()]
        mode = _Recording(self._resident())
        with mode, mode.launches():
            result = function()
        for x, values in before:
            x.copy_(values)
        mode.check(result)
        result.fill_(float("nan"))
        self.recorded += 1

        def replay():
            mode.replay()
            return result

        return Recorded(replay(), replay)


class _Recording(TorchDispatchMode):
    def __init__(self, resident):
        super().__init__()
        self._known = {address(x) for x in resident}
        self._kept = list(resident)
        """Keeps addresses from being used again."""
        self._calls = []

    def check(self, *values):
        for x in tensors_in(values):
            if x.numel() and address(x) not in self._known:
                raise RuntimeError(f"a recorded step reads a tensor {list(x.shape)} that the recording does not update")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if synchronizes(name, args, kwargs):
            raise RuntimeError(f"{name} synchronizes with the CPU while a step is recorded")
        self.check(args, kwargs)
        out = function(*args, **kwargs)
        given = {address(x) for x in tensors_in(args, kwargs)}
        results = tensors_in(out)
        self._known |= {address(x) for x in results}
        self._kept += results
        is_view = not function._schema.is_mutable and all(address(x) in given for x in results)
        if not is_view and not name.startswith("aten::empty") and name != "aten::new_empty":
            self._calls.append((function, args, kwargs, results))
        return out

    @contextlib.contextmanager
    def launches(self):
        """Record launches of kernels, too, and refuse to turn tensors into Python values."""
        run, lists = InterpretedFunction.run, Tensor.tolist

        def record(kernel, *args, grid, warmup, **kwargs):
            self.check(args, kwargs)
            with _disable_current_modes(), patched(Tensor, "tolist", lists):
                self._calls.append((run, (kernel, *args), {"grid": grid, "warmup": warmup, **kwargs}, []))
                return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        def refuse(x):
            raise RuntimeError("tolist synchronizes with the CPU while a step is recorded")

        with patched(InterpretedFunction, "run", record), patched(Tensor, "tolist", refuse):
            yield

    def replay(self):
        for function, args, kwargs, results in self._calls:
            for old, new in zip(results, tensors_in(function(*args, **kwargs))):
                if old is not new and address(old) != address(new):
                    old.copy_(new)


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
