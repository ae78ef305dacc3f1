"""Errors of servers that a measuring client meets."""

import asyncio

import pytest

from benchmarks.lib.http_streams import read_stream
from model.errors import FiftyfoldError

EVENT = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'


async def read_from(answer):
    """Read a stream from a server that sends ``answer`` and closes the connection."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        return await read_stream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {"prompt": "a"})


def test_tokens_are_those_of_the_usage():
    assert asyncio.run(read_from(b"HTTP/1.1 200 OK\r\n\r\n" + EVENT)).tokens == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "the connection was closed without an HTTP answer"),
        (b"\r\n", "the connection was closed without an HTTP answer"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "status 200 and no events"),
        (b'HTTP/1.1 404 Not Found\r\n\r\n{"error": "no model"}', 'status 404: {"error": "no model"}'),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "stopped"}\n', "stopped"),
    ],
)
def test_answers_without_a_stream_are_one_sentence(answer, message):
    with pytest.raises(FiftyfoldError, match=rf"^http://127\.0\.0\.1:\d+: {message}$"):
        asyncio.run(read_from(answer))
