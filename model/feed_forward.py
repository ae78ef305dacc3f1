"""The dense feed-forward block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from kernels.autocast import cast, product_dtype
from kernels.swiglu import swiglu
from model.forward.context import Context
from model.layers.linear import Linear

if TYPE_CHECKING:
    from model.config import ModelConfig


class DenseFeedForward(nn.Module):
    """One SwiGLU of inner width ``size``. [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.limit = config.swiglu_bound
        self.w1 = Linear(config.hidden_size, size)
        self.w3 = Linear(config.hidden_size, size)
        self.w2 = Linear(size, config.hidden_size)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.w1.weight, self.w3.weight, self.w2.weight

    def forward(self, x: Tensor, input_ids: Tensor | None = None, context: Context | None = None) -> Tensor:
        x = cast(x, product_dtype(x))  # once for both products
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit))

    def zero_output(self) -> None:
        self.w2.weight.zero_()
