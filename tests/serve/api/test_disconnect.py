"""Cancellation of work when the client disconnects."""

import asyncio

import pytest
from fastapi import Request

from serve.api.disconnect import run_unless_disconnected


def request(disconnected: asyncio.Event) -> Request:
    """Return a request whose body has been read."""

    async def receive() -> dict[str, str]:
        await disconnected.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http"}, receive)


def test_the_result_or_the_error_of_the_work_is_passed_on() -> None:
    async def work(result: int) -> int:
        await asyncio.sleep(0)
        return 10 // result

    async def main() -> None:
        assert await run_unless_disconnected(request(asyncio.Event()), work(5)) == 2
        with pytest.raises(ZeroDivisionError):
            await run_unless_disconnected(request(asyncio.Event()), work(0))
        await asyncio.sleep(0)  # cancelled tasks end
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("cancelled", [False, True], ids=["disconnect", "cancelled"])
def test_work_is_cancelled_with_the_client_or_the_handler(cancelled) -> None:
    async def main() -> None:
        disconnected, started, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def work() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        handler = asyncio.ensure_future(run_unless_disconnected(request(disconnected), work()))
        await started.wait()
        if cancelled:
            handler.cancel()
        else:
            disconnected.set()
        await asyncio.wait({handler})
        assert handler.cancelled() if cancelled else handler.result() is None
        await ended.wait()

    asyncio.run(main())
