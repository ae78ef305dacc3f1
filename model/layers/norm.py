"""Normalization over the last dim."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.autocast import in_float32
from kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)

    def init_weights(self, std: float) -> None:
        nn.init.ones_(self.weight)


class LayerNorm(nn.Module):
    """``(x - mean(x)) / std(x) * weight + bias`` over the last dim, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with in_float32(x):
            return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)

    def init_weights(self, std: float) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
