"""Seconds to generate the documents of each evaluation task, with the checks of their text.

    python -m benchmarks.evaluation_documents [--length 32768] [--samples 1000] [--tokenizer byte]

The target is 1,000 samples of 32,768 tokens in a minute.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from evals.documents import TASKS
from evals.tasks.generators import retrieval_questions, text_spans


def seconds(task: str, options: argparse.Namespace) -> float:
    generate = retrieval_questions if TASKS[task].metric == "recall" else text_spans
    start = time.perf_counter()
    generate(
        task=task,
        length=options.length,
        samples=options.samples,
        seed=1,
        tokenizer=options.tokenizer,
        distance=options.distance,
        data=options.data,
    )
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> Result:
    rows = []
    for task in options.tasks:
        rows.append([task, f"{seconds(task, options):.1f}"])
        print(" | ".join(rows[-1]), flush=True)
    heading = f"### {options.samples:,} samples of {options.length:,} tokens, tokenizer {options.tokenizer}\n\n"
    return Result(heading + table(["task", "seconds"], rows))


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--length", type=positive_int, default=32_768)
    parser.add_argument("--samples", type=positive_int, default=1000)
    parser.add_argument("--distance", type=positive_int, default=1024, help="tokens between facts and questions")
    parser.add_argument("--tokenizer", default="byte", help="byte, or a tokenizer.json (default %(default)s)")
    parser.add_argument("--data", help="folder of prepared data (default: the standard library's source files)")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
