"""llama.cpp as a contender: a GGUF file in a process of its own, asked over a pipe.

Needs the package ``llama_cpp`` (llama-cpp-python), which holds llama.cpp's libraries; nothing else here does.
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
"""llama.cpp's enum ggml_type."""
_CELLS = 256
"""A context is a multiple of so many tokens."""


def available() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def require() -> None:
    """Raise FiftyfoldError where llama.cpp cannot be imported."""
    if not available():
        raise FiftyfoldError("llama.cpp: the package 'llama_cpp' is not importable; install llama-cpp-python")


class Context:
    """A loaded model and one sequence. Tokens are read or decoded after those that are there already."""

    def __init__(self, file: Path, tokens: int, cache: CacheType = "f16"):
        import llama_cpp

        self._lib: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept alive: C calls it
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise FiftyfoldError(f"{file}: llama.cpp cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = math.ceil(tokens / _CELLS) * _CELLS
        params.type_k = params.type_v = _TYPES[cache]
        self._batch = params.n_batch
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise FiftyfoldError(f"{file}: llama.cpp has no room for {tokens} tokens")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def read(self, ids: Sequence[int], threads: int) -> np.ndarray:
        """Append a prompt in llama.cpp's own pieces; the last token's logits, float32 [vocab]."""
        for start in range(0, len(ids), self._batch):
            self._decode(ids[start : start + self._batch], threads)
        return self._logits()

    def decode(self, ids: Sequence[int], threads: int) -> np.ndarray:
        """Append tokens one at a time; every token's logits, float32 [tokens, vocab]."""
        logits = []
        for token in ids:
            self._decode([token], threads)
            logits.append(self._logits())
        return np.stack(logits)

    def clear(self) -> None:
        """Forget the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def state(self) -> bytes:
        """The sequence, for :meth:`restore` in a context whose cache has the same type."""
        size = self._lib.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self._lib.llama_state_seq_get_data(self._context, buffer, size, 0)
        return bytes(buffer)

    def restore(self, state: bytes) -> None:
        """Continue from a sequence that another context has read. Raises FiftyfoldError where it does not fit."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self._lib.llama_state_seq_set_data(self._context, buffer, len(state), 0):
            raise FiftyfoldError("llama.cpp: this sequence does not fit into this context")

    def _decode(self, ids: Sequence[int], threads: int) -> None:
        self._lib.llama_set_n_threads(self._context, threads, threads)
        array = (self._lib.llama_token * len(ids))(*ids)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(ids)))
        if status:
            raise FiftyfoldError(f"llama.cpp: decoding ended with status {status}")

    def _logits(self) -> np.ndarray:
        """The logits of the last token, once it is computed."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab,)).copy()


class LlamaCpp:
    """A :class:`Context` in a process of its own, so that its threads and PyTorch's never share a runtime. Use it as a
    context manager."""

    def __init__(self, file: Path, tokens: int, cache: CacheType = "f16"):
        require()
        start = multiprocessing.get_context("spawn")
        self._pipe, theirs = start.Pipe()
        self._process = start.Process(target=_serve, args=(theirs, file, tokens, cache), daemon=True)
        self._process.start()
        theirs.close()  # so that reading ends where the process does
        self._receive()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def read(self, ids: Sequence[int], threads: int) -> np.ndarray:
        return self._ask("read", ids, threads)

    def decode(self, ids: Sequence[int], threads: int) -> np.ndarray:
        return self._ask("decode", ids, threads)

    def clear(self) -> None:
        self._ask("clear")

    def state(self) -> bytes:
        return self._ask("state")

    def restore(self, state: bytes) -> None:
        self._ask("restore", state)

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise FiftyfoldError(f"llama.cpp: its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, FiftyfoldError):
            raise answer
        return answer


def _serve(pipe: Connection, file: Path, tokens: int, cache: CacheType) -> None:
    """Answer the calls that come over the pipe until it is closed. The first answer says that the model is loaded."""
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
