"""The script trains a model or extends the positions of a checkpoint."""

import pytest
import torch

from benchmarks import tiny_at_a_million
from model import checkpoint
from model.config import ModelConfig
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer


@pytest.mark.long
def test_script_with_training():
    text = tiny_at_a_million.main(["--steps", "3", "--lengths", "128", "512", "--chunk", "96", "--threads", "1"])
    assert "after 3 steps" in text and "| 128 | " in text and "| 512 | " in text


def test_a_checkpoint_is_used_beyond_its_positions(tmp_path):
    model = Transformer(ModelConfig.from_preset("tiny", max_positions=300)).eval()
    checkpoint.save(model, tmp_path / "short", ByteTokenizer())
    text = tiny_at_a_million.main(f"--checkpoint {tmp_path / 'short'} --lengths 512 --threads 1".split())
    assert "'short'" in text and "| 512 | " in text
    longer = tiny_at_a_million.load_with_positions(tmp_path / "short", 512)
    ids = torch.randint(0, 258, (1, 200))
    with torch.inference_mode():
        assert torch.equal(longer(ids), model(ids))
