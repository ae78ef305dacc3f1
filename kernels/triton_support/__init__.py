"""Shared parts of the Triton backends, ``kernels/<op>/triton.py``.

* :mod:`~kernels.triton_support.platform`: whether kernels can run here, and checks of arguments.
* :mod:`~kernels.triton_support.tiles`: tile settings per architecture, and the choice among them.
* :mod:`~kernels.triton_support.plans`: the kernels, with the shapes that they are compiled and predicted for.
* :mod:`~kernels.triton_support.compilation`: compilation without a GPU: registers, shared memory, spills, instructions.
* :mod:`~kernels.triton_support.roofline`: predicted speed from compiled figures.

Only modules named ``triton_kernels`` import triton, and only when a backend runs. All others import without it.
"""
