"""The deployed endpoint beside the engine it serves, and beside ``transformers serve`` with the same weights.

    python -m benchmarks.serving_endpoint [--preset tiny] [--rounds 5] [--write docs/serving-endpoint.md]

* Ray Serve with one replica beside the engine in this process: time to the first token of one request, and tokens per
  second of 1 and 16 concurrent streams, of the latter also with longer completions.
* Ray Serve beside ``transformers serve``: tokens per second of 1 and 16 concurrent streams. ``transformers`` gets the
  weights through ``export_pretrained``. Omitted with ``--without-transformers``.

Rounds alternate between the servers. Tokens per second count from the first request to the last token. All use one
thread for the network.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.http_streams import read_stream, spread, streams_per_second, wait_until_answers
from benchmarks.lib.report import table
from model import checkpoint
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.hf import export_pretrained
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.recipe.loading import recipe_from_dict
from pipelines.steps import deploy
from serve.engine import Engine, EngineConfig, SamplingParams

STREAMS = (1, 16)
PROMPT_TOKENS = 128
TEXT = (
    "In the beginning there was a short prompt of plain letters, and every one of them became one token of the model. "
)


TRANSFORMERS = """
import transformers.modeling_utils as modeling
modeling.check_and_set_device_map = lambda device_map: None
from transformers.cli.transformers import main
main()
"""
"""The ``transformers`` command without its demand for ``accelerate``, which places a model on devices: here the CPU."""


def prompt_text(number: int) -> str:
    """Return 128 ASCII characters, which are as many tokens, different for every number."""
    return (f"{number:08d} " + TEXT * 2)[:PROMPT_TOKENS]


def save_tokenizer(folder: Path) -> Path:
    """Save a byte-level tokenizer of 256 bytes, BOS and EOS for both libraries."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    path = folder / "tokenizer.json"
    backend.save(str(path))
    return path


def save_checkpoints(folder: Path, preset: str) -> tuple[Path, Path]:
    """Save a random network for our server and for transformers."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(save_tokenizer(folder))
    config = ModelConfig.from_preset(preset, vocab_size=tokenizer.vocab_size, zero_init_output=False)
    model = Transformer(config).eval()
    checkpoint.save(model, folder / "ours", tokenizer)
    export_pretrained(model, folder / "transformers", tokenizer=tokenizer)
    return folder / "ours", folder / "transformers"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def our_endpoint(folder: Path, runs: Path) -> Iterator[str]:
    """Deploy a checkpoint as ``pipelines deploy`` does."""
    section = {"model_uri": str(folder), "port": free_port()}
    with deploy.start(recipe_from_dict({"run": {"folder": str(runs)}, "serve": section})) as deployment:
        yield deployment.url


@contextmanager
def transformers_endpoint(folder: Path, log: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-c", TRANSFORMERS, "serve", str(folder), "--device", "cpu",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            try:
                wait_until_answers(url, lambda: process.poll() is None, 300)
            except FiftyfoldError as error:
                raise FiftyfoldError(f"transformers serve: {' '.join(log.read_text()[-500:].split())}") from error
            yield url
        finally:
            process.terminate()


async def engine_tokens(engine: Engine, number: int, new_tokens: int, first: list[float] | None = None) -> int:
    """Run one completion in the engine; return its tokens and append the time to the first one to ``first``."""
    params = SamplingParams(max_tokens=new_tokens, seed=number, ignore_eos=True, logprobs=None if first is None else 0)
    started = time.perf_counter()
    stream = engine.submit([(engine.tokenizer.encode_prompt(prompt_text(number), False), params)])
    async for _ in stream:
        if first is not None:
            first.append(time.perf_counter() - started)
            first = None
    return stream.sequences[0].completion_tokens


async def endpoint_tokens(url: str, number: int, new_tokens: int, first: list[float] | None = None) -> int:
    """Like :func:`engine_tokens`, over HTTP."""
    body = {"prompt": prompt_text(number), "max_tokens": new_tokens, "seed": number, "ignore_eos": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    if first is not None:
        body["logprobs"] = 0  # the first token is sent even if it is no complete character
    reading = await read_stream(url, body)
    if first is not None:
        first.append(reading.first_seconds)
    return reading.tokens


async def transformers_tokens(url: str, model: Path, number: int, new_tokens: int) -> int:
    body = {"model": str(model), "prompt": prompt_text(number), "max_tokens": new_tokens, "temperature": 1.0}
    return (await read_stream(url, body)).tokens


async def beside_the_engine(engine: Engine, url: str, rounds: int, new_tokens: int, long_tokens: int) -> str:
    """Return tables of the endpoint and the engine. Prompts differ, so that no prefix is found."""
    cases = [*((streams, new_tokens) for streams in STREAMS), (STREAMS[-1], long_tokens)]
    numbers = iter(range(10**6))
    firsts: tuple[list[float], list[float]] = ([], [])
    speeds: dict[tuple[int, int], tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    for round_ in range(rounds + 1):
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(10):
            await engine_tokens(engine, next(numbers), 1, found[0])
            await endpoint_tokens(url, next(numbers), 1, found[1])
        for streams, tokens in cases:
            offset = next(numbers) * 100
            ours = await streams_per_second(lambda i: engine_tokens(engine, offset + i, tokens), streams)  # noqa: B023
            theirs = await streams_per_second(lambda i: endpoint_tokens(url, offset + i, tokens), streams)  # noqa: B023
            if round_:  # the first round warms up
                speeds[streams, tokens][0].append(ours)
                speeds[streams, tokens][1].append(theirs)
        if round_:
            for all_, some in zip(firsts, found):
                all_.extend(some)
    times = [[1e3 * seconds for seconds in values] for values in firsts]
    added = statistics.median(times[1]) - statistics.median(times[0])
    text = "### Endpoint beside the engine\n\n" + table(
        ["", "engine", "endpoint", "difference"],
        [["time to the first token, ms", spread(times[0], 1), spread(times[1], 1), f"+{added:.1f} ms"]]
        + [
            [f"tokens/s, {streams} stream{'s' * (streams > 1)} of {tokens} tokens", spread(ours), spread(theirs),
             f"{100 * statistics.median(theirs) / statistics.median(ours):.0f}%"]
            for (streams, tokens), (ours, theirs) in speeds.items()
        ],
    )  # fmt: skip
    return text


async def beside_transformers(url: str, other: str, model: Path, rounds: int, new_tokens: int, theirs_new: int) -> str:
    speeds: dict[int, tuple[list[float], list[float]]] = {streams: ([], []) for streams in STREAMS}
    for round_ in range(rounds + 1):
        for streams in STREAMS:
            offset = 10**7 + 10**4 * round_ + 100 * streams
            ours = await streams_per_second(lambda i: endpoint_tokens(url, offset + i, new_tokens), streams)  # noqa: B023
            theirs = await streams_per_second(
                lambda i: transformers_tokens(other, model, offset + i, theirs_new),  # noqa: B023
                streams,
            )
            if round_:
                speeds[streams][0].append(ours)
                speeds[streams][1].append(theirs)
    return "\n### Endpoint beside `transformers serve`\n\n" + table(
        ["streams", "ours, tokens/s", "transformers, tokens/s", "times"],
        [
            [streams, spread(ours), spread(theirs), f"{statistics.median(ours) / statistics.median(theirs):.1f}"]
            for streams, (ours, theirs) in speeds.items()
        ],
    )


def measure(options: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours, exported = save_checkpoints(folder, options.preset)
        url = stack.enter_context(our_endpoint(ours, folder))
        engine = Engine.from_checkpoint(ours, EngineConfig())

        async def all_tables() -> str:
            text = await beside_the_engine(engine, url, options.rounds, options.tokens, options.long_tokens)
            await engine.stop()
            if not options.without_transformers:
                other = stack.enter_context(transformers_endpoint(exported, folder / "transformers.log"))
                text += await beside_transformers(
                    url, other, exported, max(1, options.rounds // 2), options.tokens, options.their_tokens
                )
            return text

        text = asyncio.run(all_tables())
    text = f"Network: '{options.preset}'; prompts of {PROMPT_TOKENS} tokens.\n\n{text}"
    return Result(text, has_servers=True)


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--tokens", type=positive_int, default=128, help="generated tokens per stream")
    parser.add_argument("--long-tokens", type=positive_int, default=512, help="the same in another row")
    parser.add_argument("--their-tokens", type=positive_int, default=32, help="the same for transformers serve")
    parser.add_argument("--without-transformers", action="store_true")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
