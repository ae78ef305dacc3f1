"""Linear layers without bias, whose weights may be stored in BF16."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.linear import linear


class Linear(nn.Linear):
    """A linear layer without bias: :func:`kernels.linear.linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
