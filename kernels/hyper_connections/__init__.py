"""Manifold-constrained hyper-connections: several residual streams, mixed by doubly stochastic matrices."""

from kernels.hyper_connections.reference import collapse, expand, mixing_weights, sinkhorn

__all__ = ["collapse", "expand", "mixing_weights", "sinkhorn"]
