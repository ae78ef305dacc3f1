"""Memory that operations allocate."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationRecorder(TorchDispatchMode):
    """Records the bytes of every tensor that an operation creates, in total and from ``source``."""

    def __init__(self, source=None):
        super().__init__()
        self.all, self.from_source = [], []
        self.source = None if source is None else source.untyped_storage().data_ptr()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.all.append(x.untyped_storage().nbytes())
                if self.source in given:
                    self.from_source.append(self.all[-1])
        return result
