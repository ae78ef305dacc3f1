"""Detection of loss spikes and non-finite gradients."""

import json
import math

import pytest

from model.errors import FiftyfoldError
from pipelines.training.loss_spikes import SpikeDetector


def test_a_loss_spike_is_detected(prepared):
    settings = prepared.train.stability.model_copy(update={"window": 8, "spike": 1.0})
    watch = SpikeDetector(settings)
    losses = [5.0, 4.9, 4.8, 4.7, 4.6]
    assert not any(watch.reason_to_skip(step, loss, 1.0) for step, loss in enumerate(losses))
    assert watch.reason_to_skip(6, 5.9, 1.0) and not watch.reason_to_skip(7, 5.7, 1.0)
    again = SpikeDetector(settings)
    again.load(json.loads(json.dumps(watch.state())))
    assert again.interventions == 1 and again.reason_to_skip(8, 6.0, 1.0)
    watch.reset()
    assert not watch.reason_to_skip(8, 9.0, 1.0)
    stops = SpikeDetector(settings.model_copy(update={"action": "stop"}))
    with pytest.raises(FiftyfoldError, match="step 1: the gradient is not finite"):
        stops.reason_to_skip(1, 3.0, math.inf)
