"""Linear layers without bias, whose weights may be stored in BF16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.linear import linear


class Linear(nn.Linear):
    """A linear layer without bias: :func:`kernels.linear.linear`.

    ``full_precision`` exempts the weight from :meth:`cast_weights`.
    """

    def __init__(self, inputs: int, outputs: int, full_precision: bool = False):
        super().__init__(inputs, outputs, bias=False)
        self.full_precision = full_precision

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def init_weights(self, std: float) -> None:
        self.weight.normal_(std=std)

    def cast_weights(self, dtype: torch.dtype) -> None:
        if not self.full_precision:
            self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
