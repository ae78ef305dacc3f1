"""The script that needs torch alone runs, and refuses what cannot be measured."""

import pytest
import torch

from benchmarks import on_device
from model.errors import FiftyfoldError

SHORT = ["--device", "cpu", "--preset", "tiny", "--rounds", "1", "--tokens", "2", "--prompt", "8", "--chunk", "8"]


def test_the_whole_script():
    text = on_device.main([*SHORT, "--lengths", "64", "8192"])
    assert "| 64 | " in text and "| 8,192 | " in text and "preset 'tiny'" in text


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
