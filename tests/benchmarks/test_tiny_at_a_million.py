"""A model trained by the script reads and decodes; a checkpoint's own positions do not stop it."""

import pytest
import torch

from benchmarks import tiny_at_a_million
from model import checkpoint
from model.config import ModelConfig
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer


@pytest.mark.long
def test_the_script_trains_reads_and_decodes():
    text = tiny_at_a_million.main(["--steps", "3", "--lengths", "128", "512", "--chunk", "96", "--threads", "1"])
    assert "after 3 steps" in text and "| 128 | " in text and "| 512 | " in text


def test_a_checkpoint_is_read_past_its_positions(tmp_path):
    model = Transformer(ModelConfig.from_preset("tiny", max_positions=300)).eval()
    checkpoint.save(model, tmp_path / "short", ByteTokenizer())
    text = tiny_at_a_million.main(f"--checkpoint {tmp_path / 'short'} --lengths 512 --threads 1".split())
    assert "'short'" in text and "| 512 | " in text
    longer = tiny_at_a_million.load_with_room(tmp_path / "short", 512)
    ids = torch.randint(0, 258, (1, 200))
    with torch.inference_mode():
        assert torch.equal(longer(ids), model(ids))
