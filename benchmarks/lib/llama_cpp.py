"""llama.cpp with a GGUF file, in a separate process.

Requires the optional package ``llama_cpp`` (llama-cpp-python), which contains llama.cpp's libraries.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.errors import FiftyfoldError

CacheType = Literal["f32", "f16", "q8_0"]
_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
"""Values of llama.cpp's enum ggml_type."""
_CONTEXT_MULTIPLE = 256
"""Context sizes are multiples of this number of tokens."""


def available() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def require() -> None:
    """Raise FiftyfoldError if llama.cpp cannot be imported."""
    if not available():
        raise FiftyfoldError("llama.cpp: cannot import the package 'llama_cpp'; install llama-cpp-python")


class Context:
    """A loaded model and one sequence, to which tokens are appended."""

    def __init__(self, file: Path, tokens: int, cache: CacheType = "f16"):
        import llama_cpp

        self._lib: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(
            lambda level, text, data: None
        )  # keep a reference for the C callback
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise FiftyfoldError(f"{file}: llama.cpp cannot load this file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = math.ceil(tokens / _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
        params.type_k = params.type_v = _TYPES[cache]
        self._batch = params.n_batch
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise FiftyfoldError(f"{file}: llama.cpp cannot allocate a context of {tokens} tokens")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, ids: Sequence[int], threads: int) -> np.ndarray:
        """Append a prompt in llama.cpp's batch size and return the last token's logits, float32 [vocab]."""
        for start in range(0, len(ids), self._batch):
            self._decode(ids[start : start + self._batch], threads)
        return self._logits()

    def decode(self, ids: Sequence[int], threads: int) -> np.ndarray:
        """Append tokens one at a time and return their logits, float32 [tokens, vocab]."""
        logits = []
        for token in ids:
            self._decode([token], threads)
            logits.append(self._logits())
        return np.stack(logits)

    def clear(self) -> None:
        """Remove the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def state(self) -> bytes:
        """Return the sequence's state for :meth:`restore` in a context with the same cache type."""
        size = self._lib.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self._lib.llama_state_seq_get_data(self._context, buffer, size, 0)
        return bytes(buffer)

    def restore(self, state: bytes) -> None:
        """Restore the state of another context's sequence. Raises FiftyfoldError if it does not fit."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self._lib.llama_state_seq_set_data(self._context, buffer, len(state), 0):
            raise FiftyfoldError("llama.cpp: the sequence does not fit into this context")

    def _decode(self, ids: Sequence[int], threads: int) -> None:
        self._lib.llama_set_n_threads(self._context, threads, threads)
        array = (self._lib.llama_token * len(ids))(*ids)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(ids)))
        if status:
            raise FiftyfoldError(f"llama.cpp: decoding failed with status {status}")

    def _logits(self) -> np.ndarray:
        """Wait for the last token and return its logits."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab,)).copy()


class LlamaCpp:
    """Context manager that runs a :class:`Context` in a separate process.

    Its threads and PyTorch's would otherwise share an OpenMP runtime.
    """

    def __init__(self, file: Path, tokens: int, cache: CacheType = "f16"):
        require()
        spawn = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(child_pipe, file, tokens, cache), daemon=True)
        self._process.start()
        child_pipe.close()  # so that recv() fails when the process exits
        self._receive()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def prefill(self, ids: Sequence[int], threads: int) -> np.ndarray:
        return self._call("prefill", ids, threads)

    def decode(self, ids: Sequence[int], threads: int) -> np.ndarray:
        return self._call("decode", ids, threads)

    def clear(self) -> None:
        self._call("clear")

    def state(self) -> bytes:
        return self._call("state")

    def restore(self, state: bytes) -> None:
        self._call("restore", state)

    def _call(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            reply = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise FiftyfoldError(f"llama.cpp: the process exited with status {self._process.exitcode}") from None
        if isinstance(reply, FiftyfoldError):
            raise reply
        return reply


def _serve(pipe: Connection, file: Path, tokens: int, cache: CacheType) -> None:
    """Serve calls from the pipe until it is closed. The first reply signals that the model is loaded."""
    try:
        context = Context(file, tokens, cache)
        pipe.send(None)
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(context, name)(*arguments))
    except FiftyfoldError as error:
        pipe.send(error)
    except EOFError:
        pass
