"""The script that needs torch alone runs, and refuses what cannot be measured."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import on_device, training_on_device
from benchmarks.lib.training import objective
from benchmarks.training_on_device import model_flops
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.transformer import Transformer

SHORT = ["--device", "cpu", "--preset", "tiny", "--rounds", "1", "--tokens", "2", "--prompt", "8", "--chunk", "8"]


def test_the_whole_script():
    text = on_device.main([*SHORT, "--lengths", "64", "8192"])
    assert "| 64 | float32 | " in text and "| 8,192 | bfloat16 | " in text and "Preset 'tiny'" in text


def test_a_length_too_short_to_measure_is_refused():
    with pytest.raises(FiftyfoldError, match="--lengths: 20 tokens are not more than the 20"):
        on_device.main([*SHORT, "--lengths", "20"])


def test_a_number_that_measures_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        on_device.main([*SHORT, "--rounds", "0"])
    assert "argument --rounds: 0 is less than 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(FiftyfoldError, match="--device cuda: this machine has no GPU"):
        on_device.main(["--device", "cuda"])


def test_the_whole_script_for_training():
    text = training_on_device.main(
        ["--device", "cpu", "--presets", "tiny", "--rows", "1", "--length", "64", "--rounds", "1", "--peak-tflops", "1"]
    )
    assert "| tiny | 1 x 64 | " in text and "% |" in text


def test_model_flops_are_those_that_torch_counts():
    """Of a network whose attention is over all positions: what is computed beyond the causal half is left out."""
    config = ModelConfig.from_preset("tiny", layers=("gqa",) * 4, hyper_connections=False, ffn="dense", qat=False)
    model, ids = Transformer(config).train(), torch.randint(258, (1, 257))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(model, ids).backward()
    attention = 3 * 4 * config.num_heads * config.head_dim * 256 / 2 * config.num_layers
    expected = 256 * (model_flops(config, 256) + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
