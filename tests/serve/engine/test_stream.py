"""Lists of output: their pace, signs of life while there is none, errors, and the end."""

import asyncio

import pytest

from serve.engine import Delta, EngineError, Pace, Stream
from serve.engine.sequence import Sequence
from serve.engine.stream import BATCHES_PER_SECOND, LONGEST_INTERVAL

HOUR = 3600.0
END = Delta("end", finish_reason="length")


class Output:
    """A stream of ``n`` completions, which only this class fills. ``abort`` is recorded."""

    def __init__(self, n: int = 1):
        self.aborted: list[Sequence] = []
        self.stream = Stream([object() for _ in range(n)], self.aborted.append)

    def put(self, *texts: str | Delta, completion: int = 0) -> None:
        for text in texts:
            self.stream.put(self.stream.sequences[completion], Delta(text, tokens=1) if isinstance(text, str) else text)


def texts(batch: list[tuple[int, Delta]]) -> list[str]:
    return [delta.text for _, delta in batch]


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_the_first_output_comes_at_once_and_the_rest_at_the_end() -> None:
    async def main() -> None:
        output = Output()
        batches = output.stream.batches(Pace(HOUR))
        first = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        output.put("a")
        assert texts(await first) == ["a"]
        rest = asyncio.ensure_future(anext(batches))
        for text in "bcd":
            await asyncio.sleep(0.01)
            output.put(text)
        assert not rest.done()
        output.put(END)
        assert texts(await rest) == ["b", "c", "d", "end"]  # and not after an hour
        with pytest.raises(StopAsyncIteration):
            await anext(batches)

    run(main())


def test_output_between_two_lists_is_collected_for_the_interval() -> None:
    async def main() -> None:
        output = Output()
        batches = output.stream.batches(Pace(0.02))
        output.put("a")
        assert texts(await anext(batches)) == ["a"]
        following = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        output.put("b", "c")
        await asyncio.sleep(0)
        assert not following.done()
        assert texts(await following) == ["b", "c"]
        output.put(END)
        assert texts(await anext(batches)) == ["end"]

    run(main())


def test_without_an_interval_every_output_has_a_list_of_its_own() -> None:
    async def main() -> None:
        for outputs in (lambda stream: stream.batches(Pace()), lambda stream: stream):
            output = Output(2)
            output.put("a", END)
            output.put("b", END, completion=1)
            found = [one if isinstance(one, list) else [one] async for one in outputs(output.stream)]
            assert [texts(batch) for batch in found] == [["a"], ["end"], ["b"], ["end"]]

    run(main())


def test_the_end_is_that_of_the_last_completion() -> None:
    async def main() -> None:
        output = Output(2)
        batches = output.stream.batches(Pace(HOUR))
        output.put("a")
        assert await anext(batches) == [(0, Delta("a", tokens=1))]
        rest = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        output.put(END)
        await asyncio.sleep(0.01)
        assert not rest.done()
        output.put("b", END, completion=1)
        assert [(index, delta.text) for index, delta in await rest] == [(0, "end"), (1, "b"), (1, "end")]

    run(main())


@pytest.mark.parametrize("interval", [0.0, HOUR])
def test_silence_is_filled_with_empty_lists(interval) -> None:
    async def main() -> None:
        output = Output()
        batches = output.stream.batches(Pace(interval, keep_alive=0.01))
        assert [await anext(batches), await anext(batches)] == [[], []]
        output.put("a")
        assert texts(await anext(batches)) == ["a"]
        assert [await anext(batches), await anext(batches)] == [[], []]
        output.put(END)
        assert texts(await anext(batches)) == ["end"]

    run(main())


def test_an_error_comes_after_the_output_before_it() -> None:
    async def main() -> None:
        output = Output(2)
        batches = output.stream.batches(Pace(HOUR))
        output.put("a")
        await anext(batches)
        output.put("b", Delta(error=EngineError("x")))
        output.put("late", completion=1)
        assert texts(await anext(batches)) == ["b"]
        with pytest.raises(EngineError):
            await anext(batches)

    run(main())


def test_many_streams_share_a_rate() -> None:
    async def main() -> None:
        pace = Pace(0.03)
        outputs = [Output() for _ in range(30)]
        batches = [output.stream.batches(pace) for output in outputs]
        for output, lists in zip(outputs, batches):
            output.put("a")
            await anext(lists)
        assert (pace.active, pace.shared_interval) == (30, 30 / BATCHES_PER_SECOND)
        pace.active += 1000
        assert pace.shared_interval == LONGEST_INTERVAL
        pace.active -= 1000
        outputs[0].put(END)
        async for _ in batches.pop(0):
            pass
        for lists in batches[3:]:
            await lists.aclose()
        assert (pace.active, pace.shared_interval) == (3, 0.03)
        each_alone = Pace()
        each_alone.active += 1000
        assert each_alone.shared_interval == 0
        assert Pace(HOUR).shared_interval == HOUR

    run(main())


def test_an_abort_reaches_every_completion() -> None:
    output = Output(3)
    output.stream.abort()
    assert output.aborted == output.stream.sequences
