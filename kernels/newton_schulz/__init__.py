"""Orthogonalisation of matrices by Newton-Schulz iteration: Muon's inner loop."""

from kernels.newton_schulz.reference import V4_COEFFICIENTS, newton_schulz

__all__ = ["V4_COEFFICIENTS", "newton_schulz"]
