"""When a test compares bits and when it allows for rounding: one rule for the whole suite.

Bits are compared where the arithmetic promises them:

* values are copied, packed, saved, restored or sent;
* the same operations run again on operands of the same shapes with the same number of threads: a resumed run, a
  recomputed layer, a fork of a cache;
* sums are exact in any order, as those of small integers are;
* the code under test promises bits itself, as the batch-invariant mode does.

Everything else is compared within a bound. Libraries choose their code by a product's shape, its batch, the threads and
the processor's instructions, so that a matrix may round differently in another batch, in a row with more tokens, routed
to an expert with others, or on another number of ranks, and in BF16 more than in float32. Equal bits there are a
coincidence of one processor. A bound lies well above what rounding does and well below what the bug does that the test
is for. A cache format multiplies rounding: a value on the border between two of its own may fall either way, and move
logits by about 1e-3. A bound below that needs a network that rounds nothing.

Where shapes differ for no reason of the test's own, they can be made equal, and then bits are promised again
(:func:`one_by_one`). A choice (an argmax, a top-k, an expert) is compared exactly where its margin exceeds what
rounding does, and otherwise by the share that agrees.

``ONEDNN_MAX_CPU_ISA``, ``ATEN_CPU_CAPABILITY`` and ``MKL_ENABLE_INSTRUCTIONS`` make a processor round as an older one.
"""

import torch


def one_by_one(iterate):
    """An orthogonalization that takes the matrices of a batch [N, rows, columns] one at a time, each in memory of its
    own: then a matrix has the same bits in every batch."""

    def each_alone(matrices, *arguments, **options):
        return torch.cat([iterate(matrix.clone(), *arguments, **options) for matrix in matrices.split(1)])

    return each_alone
