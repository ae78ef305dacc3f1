"""Cache bytes per token at 64K tokens: real storages against the closed form, hybrid against baseline.

    python -m benchmarks.cache_bytes [--tokens 65536]

The caches are filled: every entry is packed from random values through the calls that a forward pass makes.
"""

from __future__ import annotations

import argparse

import torch

from model.budget import cache_bytes_per_token, fixed_state_bytes
from model.cache import Cache, PackedEntries, TailState, WindowState
from model.config import ModelConfig

CHUNK = 4096


def fill(cache: Cache, tokens: int) -> None:
    """Pack random values into every part, as if ``tokens`` tokens had been read."""
    config = cache.config
    for layer in cache.layers:
        ratio = config.compress_ratio(layer.mixer)
        for part in layer.parts.values():
            if isinstance(part, TailState):
                part.write(torch.randn(cache.batch_size, *part.data.shape[1:]), part.data.shape[1])
                continue
            left = tokens // ratio if isinstance(part, PackedEntries) else config.window
            while left:
                n = min(CHUNK, left)
                part.append(torch.randn(cache.batch_size, n, part.layout.size))
                left -= n
            assert isinstance(part, PackedEntries | WindowState)
    cache.advance(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65_536)
    tokens = parser.parse_args().tokens
    tiny = ModelConfig.from_preset("tiny")
    models = {
        "tiny hybrid": tiny,
        "tiny hybrid, BF16 cache": tiny.replace(cache_precision="bf16"),
        "tiny baseline (gqa, BF16)": tiny.replace(
            layers=("gqa",) * tiny.num_layers, cache_precision="bf16", hyper_connections=False, qat=False
        ),
        "small hybrid": ModelConfig.from_preset("small"),
        "small baseline (gqa, BF16)": ModelConfig.from_preset(
            "small", layers=("gqa",) * 8, cache_precision="bf16", hyper_connections=False, qat=False
        ),
    }
    print(f"cache of one sequence of {tokens:,} tokens, bytes per token")
    print(f"{'':28}{'growing (closed form)':>24}{'with fixed state':>18}{'measured':>12}{'difference':>12}")
    for name, config in models.items():
        cache = Cache(config, 1, tokens)
        fill(cache, tokens)
        growing = sum(cache_bytes_per_token(config).values())
        closed = growing + sum(fixed_state_bytes(config).values()) / tokens
        measured = cache.nbytes() / tokens
        print(f"{name:28}{growing:24.2f}{closed:18.2f}{measured:12.2f}{measured / growing - 1:12.2%}")


if __name__ == "__main__":
    main()
