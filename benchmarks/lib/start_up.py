"""Time from the start of a process to its first token: imports, loading the weights, reading a prompt, one step.

    python -m benchmarks.lib.start_up ours FOLDER [--weights bfloat16] [--threads 2]

is such a process. It reads 16 tokens and prints the next one. Benchmarks call :func:`start_up`, which times several.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.lib.timing import Timing
from model.errors import FiftyfoldError

PROMPT = list(range(2, 18))


def start_up(side: str, weights: Path, precision: str, threads: int, rounds: int = 3) -> Timing:
    """Seconds from starting a process of ``side`` until it prints a token. Raises FiftyfoldError where it prints none.

    The files are read once before, so that no round waits for the disk.
    """
    command = [sys.executable, "-m", __name__, side, str(weights), "--weights", precision, "--threads", str(threads)]
    return Timing([_seconds(command) for _ in range(rounds + 1)][1:])


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
    if process.returncode or not line.strip().isdecimal():
        raise FiftyfoldError(f"start-up of {command[3]}: the process ended with status {process.returncode}, no token")
    return seconds


def _ours(options: argparse.Namespace) -> int:
    return _from_network("Ours", options)


def _transformers(options: argparse.Namespace) -> int:
    return _from_network("Theirs", options)


def _from_network(name: str, options: argparse.Namespace) -> int:
    import torch

    from benchmarks.lib import contenders

    torch.set_num_threads(options.threads)
    network = getattr(contenders, name)(options.folder, options.weights)
    logits = network.read(network.cache(len(PROMPT)), torch.tensor([PROMPT]), len(PROMPT))
    return int(logits.argmax())


def _llama_cpp(options: argparse.Namespace) -> int:
    from benchmarks.lib.llama_cpp import Context

    return int(Context(options.folder, 256).read(PROMPT, options.threads).argmax())


SIDES = {"ours": _ours, "transformers": _transformers, "llama.cpp": _llama_cpp}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=list(SIDES))
    parser.add_argument("folder", type=Path, help="with the weights; a GGUF file for llama.cpp")
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    print(SIDES[options.side](options), flush=True)


if __name__ == "__main__":
    main()
