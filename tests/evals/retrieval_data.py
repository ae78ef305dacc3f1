"""Checkpoints and token shards for the tests of the evaluation tasks."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer

CONFIG = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=1024)
DISTANCE = 3 * CONFIG.window
"""Tokens that the stacked windows of CONFIG reach."""


def save_checkpoint(folder, config=CONFIG, tokenizer=None):
    torch.manual_seed(0)
    checkpoints.save(Transformer(config), folder, tokenizer or ByteTokenizer())
    return str(folder)


def write_shards(folder, texts, tokenizer):
    """Write a data folder as the prepare step does: each text in two pieces, in reverse order, and a retrieval document
    that must not become a filler."""
    (folder / "validation").mkdir(parents=True)
    tokenizer.save(folder)
    rows = []
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text)
        half = len(ids) // 2
        rows.append(("text", [tokenizer.bos_id, *ids[half:], tokenizer.eos_id], str(i), 1))
        rows.append(("text", [tokenizer.bos_id, *ids[:half]], str(i), 0))
    rows.append(("mqar", [tokenizer.bos_id, *tokenizer.encode("!retrieval! @A1 " * 500)], "generated", 0))
    kind, tokens, document, piece = zip(*rows)
    table = {
        "kind": kind,
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
        "document_id": document,
        "piece": pa.array(piece, pa.int32()),
    }
    pq.write_table(pa.table(table), folder / "validation" / "00000.parquet")
    return str(folder)
