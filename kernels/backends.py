"""Selection of an operation's backend.

Every package ``kernels/<op>`` has a dictionary ``BACKENDS`` of its implementations and a function ``backend_for``,
which returns the name of the one that runs for given inputs. Public functions take ``backend=`` to force another one.
Their names:

* ``reference``: readable and differentiable PyTorch; the oracle of the tests.
* ``eager``: faster PyTorch.
* ``cpu``: native C++ operators (:mod:`kernels.native`).
* ``triton``: GPU kernels (:mod:`kernels.triton_support`).
"""

from __future__ import annotations

from types import ModuleType


def get_backend(backends: dict[str, ModuleType], name: str) -> ModuleType:
    """Return the backend called ``name``. Raises ValueError that lists the existing ones.

    A decoded token makes about 200 of these calls, so this stays a dictionary lookup.
    """
    backend = backends.get(name)
    if backend is None:
        operation = (next(iter(backends.values())).__package__ or "").rpartition(".")[2]
        raise ValueError(f"{operation}: unknown backend '{name}'; choose one of {', '.join(backends)}")
    return backend
