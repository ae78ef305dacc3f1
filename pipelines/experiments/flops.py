"""FLOPs of trainings in closed form, and FLOPs of decoding counted on PyTorch's operators."""

from __future__ import annotations

from typing import Any

import ray
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model.cache import Cache
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.costs import decode_work
from model.optim import MuonAdamW
from model.transformer import Transformer
from pipelines.recipe.schema import Recipe
from pipelines.training.curriculum import Stage, curriculum

TRAINING_RULE = (
    "forward pass of the closed form of decoding, summed over the positions of a row; backward pass twice as much; "
    "dense stages attend to all entries; Muon's orthogonalization included; formats not weighted"
)
_MAX_POSITIONS = 1024
"""Maximum number of positions at which the closed form is evaluated; longer rows use evenly spaced ones."""


def training_flops(recipe: Recipe) -> float:
    """Return the FLOPs of a training (TRAINING_RULE)."""
    model = Transformer.on_meta(recipe.model)
    optimizer = MuonAdamW(model.named_parameters(), recipe.train.optimizer, model.split_sizes())
    update = 2.0 * optimizer.multiplications()
    return sum(stage.steps * (_step_flops(stage) + update) for stage in curriculum(recipe))


def _step_flops(stage: Stage) -> float:
    """Return the FLOPs of the forward and backward pass of one step."""
    length, config = stage.sequence_length, stage.model
    if stage.attends == "dense":
        config = config.replace(index_topk=length)
    count = min(length, _MAX_POSITIONS)
    positions = [1 + int((i + 0.5) * length / count) for i in range(count)]
    work = [part for position in positions for part in decode_work(config, position)]
    indexing = sum(part.flops for part in work if part.kind == "index")
    others = sum(part.flops for part in work if part.kind != "index")
    if stage.warms_up:
        passes = 3 * indexing + others  # only indexers have a backward pass
    else:
        passes = 3 * others + (3 * indexing if stage.attends == "sparse" else 0)
    return passes * stage.batch_rows * length / count


def count_decode_flops(configs: list[ModelConfig], context: int) -> list[float]:
    """Return the FLOPs of decoding the ``context``-th token with each network, counted on PyTorch's operators.

    Native operators cannot be counted, so a Ray task without them runs the networks.
    """
    remote = ray.remote(num_cpus=1, runtime_env={"env_vars": {"ATEN_CPU_CAPABILITY": "default"}})(_count)
    return ray.get(remote.remote([config.to_dict() for config in configs], context))


def _count(configs: list[dict[str, Any]], context: int) -> list[float]:
    found = []
    # PyTorch's counter does not know this operator.
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    for values in configs:
        config = ModelConfig.from_dict(values)
        cache = Cache(config, 1, context)
        fill_random(cache, context - 1)
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with torch.inference_mode(), counter:
            Transformer(config).eval()(torch.zeros((1, 1), dtype=torch.int64), cache, last_only=True)
        found.append(float(counter.get_total_flops()))
    return found


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **others: Any) -> int:
    batch, heads = query[:2]
    return sdpa_flop_count(query, (batch, heads, *key[2:]), (batch, heads, *value[2:]))
