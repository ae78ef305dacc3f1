"""Recordings of operators on a CPU."""

import threading

import pytest
import torch
from backend_testing import needs_native

from kernels import native
from kernels.native.recording import record

pytestmark = needs_native


def test_a_replay_sees_new_values_and_writes_to_kept_tensors():
    x, total, weights = torch.arange(6.0).view(2, 3), torch.zeros(3), [torch.eye(3), 2 * torch.eye(3)]

    def function():
        first, second = native.op("linear")(x.unsqueeze(0), weights).chunk(2, dim=-1)
        total.add_(torch.stack([first[0, 0], second[0, 1]]).sum(0))
        return torch.cat((first, total.expand(1, 2, 3)), dim=1) * 0.5

    recorded = record(function)
    assert recorded.refusal == ""
    for value in (1.0, -2.0):
        x.fill_(value)
        before = total.clone()
        found = recorded.replay()
        assert torch.equal(total, before + 3 * value)
        assert torch.equal(found[0, :2], torch.full((2, 3), value / 2)) and torch.equal(found[0, 2], total / 2)


def test_the_first_run_is_an_ordinary_one():
    x = torch.ones(2)
    assert torch.equal(record(lambda: x.add_(1)).result, torch.full((2,), 2.0)) and x[0] == 2


def test_results_stay_valid():
    x = torch.zeros(2)
    replay = record(lambda: x + 1).replay
    first = replay()
    x.fill_(5)
    assert torch.equal(replay(), torch.full((2,), 6.0)) and torch.equal(first, torch.ones(2))


def test_only_operators_of_the_recording_thread_are_recorded():
    x, y = torch.zeros(2), torch.zeros(2)

    def function():
        other = threading.Thread(target=lambda: y.add_(1))
        other.start()
        other.join()
        return x + 1

    replay = record(function).replay
    replay()
    assert y[0] == 1


def test_recordings_of_several_threads_are_independent():
    """A barrier makes them overlap."""
    barrier, found = threading.Barrier(2), {}

    def run(name, number):
        x = torch.full((2,), number)

        def function():
            barrier.wait()
            y = x * 2
            barrier.wait()
            return y + 1

        found[name] = record(function).replay()

    threads = [threading.Thread(target=run, args=(str(n), float(n))) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["1"].tolist() == [3, 3] and found["2"].tolist() == [5, 5]


MASKED = "the shape of its result depends on values"
REFUSED = {
    "all": (lambda x: x + bool((x > 0).all()), "aten::is_nonzero returns a value to Python"),
    "equal": (lambda x: x + torch.equal(x, x), "aten::equal returns a value to Python"),
    "item": (lambda x: x + x.sum().item(), "aten::item returns a value to Python"),
    "from a list": (
        lambda x: x + torch.tensor([1, 2, 3]),
        "reads a tensor that Python made meanwhile",
    ),
    "mask": (lambda x: x[x > 1].sum(), f"aten::index: {MASKED}"),
    "nonzero": (lambda x: x.nonzero().sum(), f"aten::nonzero: {MASKED}"),
    "unique": (lambda x: x.unique().sum(), f"aten::_unique2: {MASKED}"),
    "no operator": (lambda x: OUTSIDE, "the result is not computed by an operator"),
}
OUTSIDE = torch.zeros(1)


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_cannot_be_repeated_are_refused(name):
    function, reason = REFUSED[name]
    x = torch.tensor([2, 1, 3])
    recorded = record(lambda: function(x))
    assert recorded.replay is None and reason in recorded.refusal
    assert torch.equal(recorded.result, function(x))


def test_an_index_without_a_mask_is_repeated():
    x, places = torch.tensor([2, 1, 3]), torch.tensor([0, 2])
    replay = record(lambda: x[places] + 1).replay
    places.fill_(1)
    assert replay().tolist() == [2, 2]


def test_an_exception_ends_the_recording():
    x = torch.zeros(2)
    with pytest.raises(ZeroDivisionError):
        record(lambda: x + 1 / 0)
    assert record(lambda: x + 1).replay() is not None
    with pytest.raises(RuntimeError, match="another recording is active"):
        record(lambda: record(lambda: x + 1).result)
    assert record(lambda: x + 1).replay() is not None


def test_a_fault_in_a_replay_is_raised():
    x, places = torch.zeros(3), torch.tensor([0])
    replay = record(lambda: x.index_select(0, places)).replay
    places.fill_(7)
    with pytest.raises(IndexError, match="out of range"):
        replay()
