"""Recorded decode steps without a recording, to test their bookkeeping on a CPU."""

import torch


def rerun(function):
    """A recorder that computes a step again where a GPU would replay it."""
    result = torch.empty(0)

    def replay():
        logits = function()
        result.resize_(logits.shape).copy_(logits)

    return result, replay
