"""Numerical parity with transformers' ``deepseek_v32``, ``mamba2`` and ``kimi_linear``.

    python -m benchmarks.family_parity [--only MODEL_TYPE ...] [--write docs/family-parity.md]

As ``benchmarks/parity.py`` for DeepSeek-V4: for every configuration, transformers initializes a random model and saves
it, and we import it. The comparisons in float32 are those of all lengths, decoding, prompts in two chunks, and
gradients. The tests run a part of this.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

from benchmarks.lib.family_networks import CONFIGURATIONS, draw
from benchmarks.lib.harness import Result, make_parser, run_benchmark, run_main
from benchmarks.lib.parity import Pair, check_margin, comparisons, make_pair, table

SEEDS = {
    ("deepseek_v32", "as released"): 2,
    ("deepseek_v32", "one group, two shared experts"): 5,
    ("deepseek_v32", "dense"): 4,
    ("deepseek_v32", "experts only, 3 heads"): 7,
}
"""Seeds of configurations for which seed 0 does not leave :data:`MARGIN`."""
MARGIN = 1e-5
"""Minimum gap between selected and unselected index scores, experts and groups of experts for a valid comparison."""
ALL = [(model_type, name) for model_type, configurations in CONFIGURATIONS.items() for name in configurations]
"""All configurations: (``model_type``, name)."""


def pair(model_type: str, name: str) -> Pair:
    """Initialize a configuration in transformers, save it, and import it."""
    return make_pair(draw(model_type, SEEDS.get((model_type, name), 0), **CONFIGURATIONS[model_type][name]))


class _Gaps(TorchFunctionMode):
    """Smallest gap between the last selected and the first unselected value of all top-k calls."""

    smallest = float("inf")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.topk, torch.Tensor.topk):
            values, k = args[0], args[1] if len(args) > 1 else kwargs["k"]
            if k < values.shape[-1]:
                last, following = torch.sort(values, -1, descending=True).values[..., k - 1 : k + 1].unbind(-1)
                gaps = (last - following)[
                    following > torch.finfo(torch.float32).min / 2
                ]  # masked values are not candidates
                self.smallest = min([self.smallest, *gaps.flatten().tolist()])
        return function(*args, **kwargs)


@torch.no_grad()
def selection_margin(p: Pair) -> float:
    """Return the smallest gap between a selected and an unselected value over all selections of the oracle.

    Below float32's noise, both networks may select differently and be correct. Infinite without selections.
    """
    with _Gaps() as gaps:
        p.oracle(p.ids, use_cache=False)
    return gaps.smallest


def measure(model_type: str, name: str) -> dict[str, Any]:
    """Run all comparisons for one configuration. Raises FiftyfoldError if its selections are nearly tied."""
    p, title = pair(model_type, name), f"{model_type}: {name}"
    check_margin(title, selection_margin(p), MARGIN)
    return {"name": title} | comparisons(p)


def run(options: argparse.Namespace) -> Result:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for model_type, name in ALL:
        if model_type in options.only:
            started = time.monotonic()
            rows.append(measure(model_type, name))
            print(f"{model_type}, {name}: {time.monotonic() - started:.0f} s", flush=True)
    return Result(table(rows), has_times=False)


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    return run_benchmark(parser, run, arguments)


if __name__ == "__main__":
    run_main(main)
