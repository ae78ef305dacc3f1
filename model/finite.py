"""Check for values that are not finite."""

from __future__ import annotations

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. Checks the extremes, which are NaN if any value is: ``isfinite`` would
    allocate several copies of the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(extreme.isfinite() for extreme in tensor.aminmax())
