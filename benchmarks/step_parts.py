"""What a training step of the tiny model costs, and what each of the five choices adds to it.

    python -m benchmarks.step_parts [--rows 16] [--repeat 3]

Every variant is timed in turn, ``repeat`` rounds, one thread; ratios are to the full recipe in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.report import command_line, count
from model.config import ModelConfig
from model.muon import MuonAdamW, OptimizerConfig
from model.telemetry import Telemetry
from model.transformer import Transformer

LENGTH = 256
VARIANTS: dict[str, tuple[dict, str]] = {
    "all five choices": ({}, "muon"),
    "gqa instead of csa/hca": ({"layers": ("gqa",) * 4}, "muon"),
    "bf16 cache formats": ({"kv_format": "bf16", "index_format": "bf16"}, "muon"),
    "AdamW instead of Muon": ({}, "adamw"),
    "plain residuals": ({"hyper_connections": False}, "muon"),
    "no quantisation in the loop": ({"qat": False}, "muon"),
    "dense feed-forward": ({"ffn": "dense"}, "muon"),
}


def step(model: Transformer, optimizer: MuonAdamW, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    telemetry = Telemetry()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, telemetry=telemetry)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    for name in ("indexer_kl", "balance"):
        extra = telemetry.loss(name)
        if extra is not None:
            loss = loss + extra
    model.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=count, default=16)
    parser.add_argument("--repeat", type=count, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 258, (arguments.rows, LENGTH))
    built = {}
    for name, (changes, rule) in VARIANTS.items():
        model = Transformer(ModelConfig.from_preset("tiny", **changes))
        built[name] = (model, MuonAdamW(model.named_parameters(), OptimizerConfig(rule=rule, ns_dtype="bfloat16")))
        step(*built[name], ids)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.repeat):
        for name, (model, optimizer) in built.items():
            times[name].append(step(model, optimizer, ids))
    full = times["all five choices"]
    print(f"one training step of tiny, {arguments.rows} rows of {LENGTH} tokens, 1 thread, {arguments.repeat} rounds")
    for name, seconds in times.items():
        ratios = [mine / base for mine, base in zip(seconds, full)]
        print(f"  {name:30} {statistics.median(seconds):6.3f} s   {statistics.median(ratios):5.2f} x the full step")


if __name__ == "__main__":
    command_line(main)
