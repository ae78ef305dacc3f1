"""The worker thread runs a bounded number of steps ahead of the event loop, and ends after any failure."""

import asyncio
import threading
import time

import pytest

from serve.engine import Engine, EngineConfig, EngineError, RequestAbortedError, SamplingParams, Stream
from serve.engine.sequence import Sequence
from serve.engine.worker import MAX_STEPS_AHEAD, Worker


class CountingScheduler:
    """Stands for a scheduler. Each step returns its number; ``total`` steps are there to do."""

    def __init__(self, total: int):
        self.total, self.steps = total, 0
        self.arrived: list = []
        self.ahead = threading.Event()

    @property
    def has_unfinished(self) -> bool:
        return self.steps < self.total

    def step(self, arrivals) -> list:
        self.arrived += arrivals
        self.steps += 1
        if self.steps > MAX_STEPS_AHEAD:
            self.ahead.set()
        return [self.steps]

    def abort_all(self) -> None:
        self.total = self.steps


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_steps_go_on_while_the_loop_is_busy_and_arrive_in_order() -> None:
    scheduler, taken = CountingScheduler(50), []

    async def main() -> None:
        worker = Worker(scheduler, taken.extend, pytest.fail)
        worker.submit(["a"])
        assert scheduler.ahead.wait(60)  # blocks the loop
        time.sleep(0.05)  # without a bound, the worker would run to the end
        assert (scheduler.steps, taken) == (MAX_STEPS_AHEAD + 1, [])
        await until(lambda: len(taken) == 50)
        await worker.stop()

    run(main())
    assert taken == list(range(1, 51))
    assert scheduler.arrived == ["a"]


def test_the_job_ends_without_work_and_a_new_one_begins_with_the_next_request() -> None:
    scheduler, taken = CountingScheduler(3), []

    async def main() -> None:
        worker = Worker(scheduler, taken.extend, pytest.fail)
        for total in (3, 5):
            scheduler.total = total
            worker.submit([total])
            await until(lambda total=total: len(taken) == total)
            assert worker._job is not None
            await asyncio.wrap_future(worker._job)  # the thread sleeps
        await worker.stop()

    run(main())
    assert scheduler.arrived == [3, 5]
    assert taken == [1, 2, 3, 4, 5]


def test_sequences_that_arrive_while_it_works_are_taken_in_the_next_step() -> None:
    scheduler = CountingScheduler(1)
    arrived, resume = threading.Event(), threading.Event()
    step = scheduler.step

    def pausing_step(arrivals):
        arrived.set()
        assert resume.wait(60)
        return step(arrivals)

    scheduler.step = pausing_step

    async def main() -> None:
        worker = Worker(scheduler, lambda results: None, pytest.fail)
        worker.submit(["a"])
        assert arrived.wait(60)
        worker.submit(["b"])
        worker.submit(["c"])
        resume.set()
        await worker.stop()

    run(main())
    assert scheduler.arrived == ["a", "b", "c"]
    assert scheduler.steps == 2


@pytest.mark.parametrize("place", ["step", "delivery"])
def test_an_exception_is_reported_and_nothing_runs_afterwards(place) -> None:
    scheduler, failures = CountingScheduler(100), []

    def broken(*_) -> None:
        raise KeyError(place)

    async def main() -> None:
        worker = Worker(scheduler, broken if place == "delivery" else (lambda results: None), failures.append)
        if place == "step":
            scheduler.step = broken
        worker.submit(["a"])
        await until(lambda: failures)
        await worker.stop()
        steps = scheduler.steps
        assert steps < scheduler.total
        worker.submit(["b"])
        await until(lambda: len(failures) == 2)
        assert scheduler.steps == steps

    run(main())
    assert [str(failure) for failure in failures] == [repr(place)] * 2


def test_a_closed_loop_ends_the_work(endless_model, letters) -> None:
    engine = Engine(endless_model, letters, EngineConfig(kept_prefixes=0))
    params = SamplingParams(max_tokens=400, temperature=0)

    async def leave() -> list[Sequence]:
        stream = engine.submit([([0, 9], params)] * 2)
        await anext(stream)
        return stream.sequences

    sequences = asyncio.run(leave())
    engine._worker._job.result(60)
    assert not engine._scheduler.has_unfinished
    assert all(0 < one.completion_tokens < 400 for one in sequences)
    assert engine.memory.used_pages == 0

    async def again() -> int:
        stream = engine.submit([([0, 9], SamplingParams(max_tokens=3, temperature=0))])
        async for _ in stream:
            pass
        assert engine.unfinished == 0
        return stream.sequences[0].completion_tokens

    assert asyncio.run(again()) == 3


def test_a_stopped_loop_ends_the_work_and_its_reader_learns_of_it(endless_model, letters) -> None:
    engine = Engine(endless_model, letters, EngineConfig(kept_prefixes=0))
    loop = asyncio.new_event_loop()

    async def begin() -> Stream:
        stream = engine.submit([([0, 9], SamplingParams(max_tokens=400, temperature=0))])
        await anext(stream)
        return stream

    async def read(stream: Stream) -> None:
        async for _ in stream:
            pass

    try:
        stream = loop.run_until_complete(begin())
        engine._worker._job.result(60)  # the thread sleeps
        assert engine.memory.used_pages == 0
        with pytest.raises(RequestAbortedError):
            loop.run_until_complete(read(stream))
        assert 0 < stream.sequences[0].completion_tokens < 400
    finally:
        loop.close()


def test_a_failing_observer_ends_all_requests(endless_model, letters) -> None:
    engine = Engine(endless_model, letters)
    observed = []

    def fail(sequence, delta):
        observed.append(delta)
        raise KeyError("a metric")

    engine.observer = fail

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        streams = [engine.submit([([0], SamplingParams())] * 2) for _ in range(2)]
        for stream in streams:
            with pytest.raises(EngineError, match=r"the engine failed \(KeyError\)$"):
                await anext(stream)
        assert engine.unfinished == 0
        await engine.stop()

    run(main())
    assert observed[0].error is None and observed[-1].error is not None


def test_a_failed_step_ends_all_requests_with_an_error_that_names_the_model(endless_model, letters) -> None:
    engine = Engine(endless_model, letters)
    engine.name_model("champion")

    def fail(arrivals):
        raise RuntimeError("out of memory")

    engine._scheduler.step = fail

    async def main() -> None:
        streams = [engine.submit([([0], SamplingParams())] * 2) for _ in range(2)]
        for stream in streams:
            with pytest.raises(EngineError, match=r"^model 'champion': the engine failed \(RuntimeError\)$"):
                await anext(stream)
        with pytest.raises(EngineError, match="out of memory"):
            engine.submit([([0], SamplingParams())])
        assert engine.unfinished == 0
        await engine.stop()

    run(main())
