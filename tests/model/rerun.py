"""Recorded decode steps without a recording, to test their bookkeeping on a CPU."""

from kernels.native.recording import Recorded


def rerun(function):
    """A recorder that computes a step again where a recording would be replayed."""
    return Recorded(function(), function)
