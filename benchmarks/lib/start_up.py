"""Time from process start to the first token: imports, loading the weights, prefill, one decoded token.

    python -m benchmarks.lib.start_up ours FOLDER [--weights bfloat16] [--threads 2]

prefills 16 tokens and prints the next one. :func:`start_up` times several such processes.
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


def start_up(network: str, weights: Path, precision: str, threads: int, rounds: int = 3) -> Timing:
    """Return the seconds from starting a process of ``network`` until it prints a token.

    An uncounted first round reads the files into the page cache. Raises FiftyfoldError if a process prints no token.
    """
    command = [sys.executable, "-m", __name__, network, str(weights), "--weights", precision, "--threads", str(threads)]
    return Timing([_seconds(command) for _ in range(rounds + 1)][1:])


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
    if process.returncode or not line.strip().isdecimal():
        raise FiftyfoldError(
            f"start-up of {command[3]}: the process exited with status {process.returncode} and printed no token"
        )
    return seconds


def _ours(options: argparse.Namespace) -> int:
    return _first_token("OurNetwork", options)


def _transformers(options: argparse.Namespace) -> int:
    return _first_token("TransformersNetwork", options)


def _first_token(name: str, options: argparse.Namespace) -> int:
    import torch

    from benchmarks.lib import contenders

    torch.set_num_threads(options.threads)
    network = getattr(contenders, name)(options.folder, options.weights)
    logits = network.prefill(network.new_cache(len(PROMPT)), torch.tensor([PROMPT]), len(PROMPT))
    return int(logits.argmax())


def _llama_cpp(options: argparse.Namespace) -> int:
    from benchmarks.lib.llama_cpp import Context

    return int(Context(options.folder, 256).prefill(PROMPT, options.threads).argmax())


NETWORKS = {"ours": _ours, "transformers": _transformers, "llama.cpp": _llama_cpp}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("folder", type=Path, help="folder of the weights, or a GGUF file for llama.cpp")
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    print(NETWORKS[options.network](options), flush=True)


if __name__ == "__main__":
    main()
