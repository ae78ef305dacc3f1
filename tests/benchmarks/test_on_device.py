"""The scripts that require only torch."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import on_device, training_on_device
from benchmarks.lib.training import training_loss
from benchmarks.training_on_device import model_flops
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.transformer import Transformer

SHORT = ["--device", "cpu", "--preset", "tiny", "--rounds", "1", "--tokens", "2", "--prompt", "8", "--chunk", "8"]


def test_inference_script():
    text = on_device.main([*SHORT, "--lengths", "64", "8192"])
    assert "| 64 | float32 | " in text and "| 8,192 | bfloat16 | " in text and "Preset 'tiny'" in text


def test_a_length_below_the_measured_tokens_is_refused():
    with pytest.raises(FiftyfoldError, match="--lengths: 20 tokens are not more than the 20"):
        on_device.main([*SHORT, "--lengths", "20"])


def test_zero_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        on_device.main([*SHORT, "--rounds", "0"])
    assert "argument --rounds: 0 is less than 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused():
    with pytest.raises(FiftyfoldError, match="--device cuda: torch finds no GPU"):
        on_device.main(["--device", "cuda"])


def test_training_script():
    text = training_on_device.main(
        ["--device", "cpu", "--presets", "tiny", "--rows", "1", "--length", "64", "--rounds", "1", "--peak-tflops", "1"]
    )
    assert "| tiny | 1 x 64 | " in text and "% |" in text


def test_model_flops_equal_torchs_count():
    """Dense attention computes all positions, of which the closed form counts the causal half."""
    config = ModelConfig.from_preset("tiny", layers=("gqa",) * 4, hyper_connections=False, ffn="dense", qat=False)
    model, ids = Transformer(config).train(), torch.randint(258, (1, 257))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training_loss(model, ids).backward()
    attention = 3 * 4 * config.num_heads * config.head_dim * 256 / 2 * config.num_layers
    expected = 256 * (model_flops(config, 256) + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
