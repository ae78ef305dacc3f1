"""Trainings in plain PyTorch processes, whole or as single ranks.

Ranks import this module, so it must import neither Ray, MLflow nor tests.
"""

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from model.config import CACHE_FORMATS
from pipelines.data.batches import stack_rows
from pipelines.data.packing import cut_rows
from pipelines.data.shards import SHARD_SCHEMA
from pipelines.recipe.loading import recipe_from_dict
from pipelines.training.build import build_trainer, folder_batches

EXACT = {**{f"model.{name}": "fp32" for name in CACHE_FORMATS}, "model.qat": False}
"""No quantization anywhere."""


class Record:
    """Reporter that records everything, and writes checkpoints to ``keep/<step>``."""

    def __init__(self, keep=None):
        self.keep, self.logged, self.events, self.reported = keep, [], [], []

    def log(self, step, metrics):
        self.logged.append((step, metrics))

    def resumed(self, step):
        self.events.append((step, "resumed"))

    def log_event(self, step, message):
        self.events.append((step, message))

    def report(self, step, metrics, write):
        self.reported.append((step, metrics))
        if write is not None and self.keep is not None:
            (self.keep / str(step)).mkdir(parents=True, exist_ok=True)
            write(self.keep / str(step))


def trainer_for(recipe, record, rank=0, world=1):
    open_whole = folder_batches(recipe)

    def open_share(stage, epoch, skip):
        return Share(open_whole(stage, epoch, skip), rank, stage.batch_rows // world)

    return build_trainer(recipe, open_whole if world == 1 else open_share, record, rank, world)


class Share:
    """One rank's rows of every batch."""

    def __init__(self, whole, rank, rows):
        self.whole, self.rows = whole, slice(rank * rows, (rank + 1) * rows)

    def __next__(self):
        return self._mine(next(self.whole))

    def peek(self, count):
        return [self._mine(batch) for batch in self.whole.peek(count)]

    def _mine(self, batch):
        return {k: v[self.rows] for k, v in batch.items()}

    @property
    def epoch(self):
        return self.whole.epoch

    @property
    def batch(self):
        return self.whole.batch

    def close(self):
        self.whole.close()


def timeless(logged):
    return [(s, {k: v for k, v in m.items() if not k.endswith("_second") and "_seconds" not in k}) for s, m in logged]


def packed_and_alone(length):
    """Yield documents as a batch of packed rows, then as a batch with a row per document."""
    rng = np.random.default_rng(0)
    documents = [
        {
            "document_id": str(i),
            "piece": 0,
            "source": "",
            "kind": kind,
            "tokens": rng.integers(0, 258, size).tolist(),
            "answer_starts": [size // 2] if kind == "mqar" else [],
            "answer_ends": [size // 2 + 2] if kind == "mqar" else [],
        }
        for i, (kind, size) in enumerate([("text", n) for n in (2, 5, 17, 40, 97, 30, 3, 61, 20)] + [("mqar", 33)] * 3)
    ]
    table = pa.Table.from_pylist(documents, schema=SHARD_SCHEMA)
    for packing in (True, False):
        rows = cut_rows(table, length, packing)
        count = len(rows["tokens"])
        yield next(stack_rows(({k: v[i] for k, v in rows.items()} for i in range(count)), count))


def with_short_rows(batch):
    batch = {name: values.clone() for name, values in batch.items()}
    batch["positions"][1::2] = torch.arange(batch["positions"].shape[1]) % 3
    return batch


def gradients_on_rank(rank, world, recipe, folder):
    """Write the gradients of the first update, for documents of any length and with every second row too short."""
    _, alone = packed_and_alone(recipe["data"]["sequence_length"])
    for name, rows in (("alone", alone), ("short", with_short_rows(alone))):
        trainer = trainer_for(recipe_from_dict(recipe), Record(), rank, world)
        trainer.train_step({key: values[rank::world] for key, values in rows.items()}, trainer.stage)
        if rank == 0:
            save_file({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, folder / name)


def broken_at(trainer, steps):
    """Make the gradients of these updates, counted from 1, non-finite."""
    update, made = trainer.train_step, []

    def sometimes(batch, stage):
        made.append(None)
        hook = None
        if len(made) in steps:
            hook = trainer.model.layers[0].attn.wkv.weight.register_hook(lambda grad: grad * float("nan"))
        try:
            return update(batch, stage)
        finally:
            if hook is not None:
                hook.remove()

    trainer.train_step = sometimes
    return made
