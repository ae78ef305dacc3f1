"""What this machine's processor multiplies fast."""

from __future__ import annotations

import torch


def has_amx() -> bool:
    """Whether it has matrix units of its own for BF16 (Intel's AMX), with several times the speed of its vectors."""
    return torch.cpu._is_amx_tile_supported()
