"""Checkpoints and token shards for the tests of the retrieval tasks."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer

CONFIG = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=1024)


def save_checkpoint(folder, config=CONFIG, tokenizer=None):
    torch.manual_seed(0)
    checkpoints.save(Transformer(config), folder, tokenizer or ByteTokenizer())
    return str(folder)


def write_shards(folder, texts, tokenizer):
    """Write a data folder as the prepare step does, with a retrieval document that must not become a filler."""
    (folder / "validation").mkdir(parents=True)
    tokenizer.save(folder)
    rows = [("text", [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    rows.append(("mqar", [tokenizer.bos_id, *tokenizer.encode("!retrieval! @A1 " * 500)]))
    table = {"kind": [kind for kind, _ in rows], "tokens": pa.array([t for _, t in rows], pa.list_(pa.int32()))}
    pq.write_table(pa.table(table), folder / "validation" / "00000.parquet")
    return str(folder)
