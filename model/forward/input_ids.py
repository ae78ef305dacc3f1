"""Checks of token IDs."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(input_ids: Tensor) -> None:
    """Raise ValueError unless ``input_ids`` is int64 or int32 [B, S] with at least one token."""
    if input_ids.dim() != 2 or not input_ids.numel() or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids: expected integers [B, S] with at least one token, "
            f"found {input_ids.dtype} {list(input_ids.shape)}"
        )
