"""Recordings of operators on a CPU."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from backend_testing import needs_native

from kernels import native
from kernels.cache_io import EntryLayout
from kernels.native.recording import record

ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/statm")


def resident_bytes():
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


MAKE = {
    "zeros": lambda x: torch.zeros(3).add_(x),
    "zeros_like": lambda x: torch.zeros_like(x).add_(x),
    "new_zeros": lambda x: x.new_zeros(3).add_(x),
    "empty": lambda x: torch.empty(3).copy_(x),
    "full": lambda x: torch.full((3,), 0.0).add_(x),
    "arange": lambda x: torch.arange(3.0).mul_(0).add_(x),
    "masked": lambda x: torch.zeros(3).masked_fill_(x > 4, 5.0).add_(x),
}


@pytest.mark.parametrize("name", MAKE)
def test_tensors_made_by_the_function_are_made_anew(name):
    x = torch.ones(3)
    recorded = record(lambda: MAKE[name](x) * 2)
    for value in (1.0, 3.0, 9.0, 1.0):
        x.fill_(value)
        assert torch.equal(recorded.replay(), MAKE[name](x) * 2)


@pytest.mark.skipif(not STATUS.exists(), reason="reads resident memory from /proc")
def test_a_recording_keeps_no_results():
    """Neither those of the first run nor those of a replay, also in lists."""
    x = torch.ones(8 << 20)
    before = resident_bytes()
    recorded = record(lambda: torch.cat([x + 1, x + 2]).mul_(2).sum())
    for _ in range(2):
        recorded.replay()
    assert resident_bytes() - before < x.nbytes


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


READ, MADE, MASKED = (
    "Python reads the values of a tensor",
    "a tensor is made from values of Python",
    "the shape of its result depends on values",
)
OUTSIDE = torch.zeros(1)
REFUSED = {
    "all": (lambda x: x + bool((x > 0).all()), "aten::is_nonzero returns a value to Python"),
    "equal": (lambda x: x + torch.equal(x, x), "aten::equal returns a value to Python"),
    "item": (lambda x: x + x.sum().item(), "aten::item returns a value to Python"),
    "tolist": (lambda x: x + sum(x.tolist()), READ),
    "numpy": (lambda x: x + int(x.numpy().sum()), READ),
    "from a list": (lambda x: x + torch.tensor([1, 2, 3]), MADE),
    "from NumPy": (lambda x: x + torch.from_numpy(numpy.ones(3, dtype=numpy.int64)), MADE),
    "mask": (lambda x: x[x > 1].sum(), f"aten::index: {MASKED}"),
    "nonzero": (lambda x: x.nonzero().sum(), f"aten::nonzero: {MASKED}"),
    "unique": (lambda x: x.unique().sum(), f"aten::_unique2: {MASKED}"),
    "no operator": (lambda x: OUTSIDE, "the result is not computed by an operator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_cannot_be_repeated_are_refused(name):
    function, reason = REFUSED[name]
    x = torch.tensor([2, 1, 3])
    recorded = record(lambda: function(x))
    assert recorded.replay is None and recorded.refusal == reason
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


# --- loops shared with other threads


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def products(seed):
    """Return a function of many loops that threads share, and its input."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(257, 257, generator=generator) / 16 for _ in range(8)]
    x = torch.randn(1, 257, generator=generator)

    def function():
        y = x
        for weight in weights:
            y = native.op("linear")(y, [weight])
        return y

    return function, x


@torch.inference_mode()
def test_shared_loops_compute_the_same(threads):
    function, x = products(0)
    replay = record(function).replay
    for _ in range(300):
        x.normal_()
        assert torch.equal(replay(), function())


def test_replays_in_several_threads_at_once(threads):
    """One of them has the team; the loops of the others run by OpenMP."""
    failed = []

    @torch.inference_mode()
    def run(seed):
        torch.set_num_threads(threads)
        function, x = products(seed)
        replay = record(function).replay
        for _ in range(100):
            x.normal_()
            if not torch.equal(replay(), function()):
                failed.append(seed)

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failed


def test_a_replay_lets_other_threads_run_python():
    x, counted = torch.randn(1000, 1000), []
    replay = record(lambda: (x @ x) @ (x @ x)).replay
    stopping = threading.Event()

    def count():
        while not stopping.is_set():
            counted.append(len(counted))
            time.sleep(0)  # gives the lock back

    other = threading.Thread(target=count)
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # Python takes the lock from no thread that does not give it back
    try:
        before, deadline = len(counted), time.monotonic() + 60
        while len(counted) == before and time.monotonic() < deadline:
            replay()
        during = len(counted) - before
    finally:
        sys.setswitchinterval(interval)
        stopping.set()
        other.join()
    assert during


@torch.inference_mode()
def test_a_fault_in_a_shared_loop_is_raised_and_leaves_the_team_intact(threads):
    """Every sequence completes an entry, in pages of one row each."""
    B, m, c = 8, 4, 128
    ring, rows, bias = torch.randn(B, m, 2 * c), torch.randn(B, 1, 2 * c), torch.randn(m, c)
    norm, angles, lengths = torch.ones(c), torch.ones(1, 1, 2), torch.full((1,), m - 1)
    layout = EntryLayout(c, "fp32")
    storage, table = torch.zeros(B, layout.nbytes, dtype=torch.uint8), torch.arange(B).unsqueeze(1)

    def function():
        arguments = ring, rows, bias, lengths, False, norm, 1e-6, angles, angles, False
        native.op("compress_next")(*arguments, storage, table, 1, layout.spec)
        return storage + 0

    expected = function()
    replay = record(function).replay
    for page in (-1, B):
        table[B - 1] = page
        with pytest.raises(IndexError, match=f"page {page} does not exist"):
            replay()
        table[B - 1] = B - 1
        storage.zero_()
        assert torch.equal(replay(), expected)


FORK = """
import os
import torch
from kernels import native
from kernels.native.recording import record
torch.set_num_threads(3)
x, weight = torch.randn(1, 512), torch.randn(512, 512)
with torch.inference_mode():
    replay = record(lambda: native.op("linear")(x, [weight])).replay
    threads = len(os.listdir("/proc/self/task"))
    expected = replay()
    assert len(os.listdir("/proc/self/task")) == threads + 2
    child = os.fork()
    assert all(torch.equal(replay(), expected) for _ in range(100))
    assert len(os.listdir("/proc/self/task")) >= 3
    if child:
        assert os.waitpid(child, 0)[1] == 0
    else:
        os._exit(0)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="counts threads in /proc")
def test_a_forked_process_has_a_team_of_its_own():
    found = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
