"""Digests of prompts' beginnings."""

import json

import pytest

from serve.gateway.prefixes import RoutingInfo, parse_routing, prefix_digests


def common(first: bytes, second: bytes) -> int:
    """Number of beginnings that two prompts have in common."""
    pairs = zip(prefix_digests(first), prefix_digests(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, map(prefix_digests, (first, second)))))


def test_digests_tell_how_far_prompts_are_equal() -> None:
    text = bytes(range(256)) * 8
    assert [len(prefix_digests(text[:n])) for n in (127, 128, 191, 192, 256, 384, 2048)] == [0, 1, 1, 2, 3, 4, 9]
    for length, shared in ((100, 0), (128, 1), (200, 2), (1023, 6), (1024, 7)):
        assert common(text, text[:length] + b"?" * 1000) == shared


def ask(**fields) -> RoutingInfo:
    return parse_routing(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "prompt", ["a" * 600, [5] * 150, ["a" * 600, "other"], [[5] * 150, [6]]], ids=["text", "tokens", "texts", "lists"]
)
def test_prompts_of_every_form_have_digests(prompt) -> None:
    assert len(ask(prompt=prompt).prefix) == 5
    assert ask(prompt=prompt) == ask(prompt=prompt, max_tokens=5)
    single = isinstance(prompt[0], (str, int)) and not (isinstance(prompt, list) and isinstance(prompt[0], str))
    assert ask(prompt=prompt if single else prompt[0]).prefix == ask(prompt=prompt).prefix


def test_a_chat_continues_its_earlier_turns() -> None:
    turns = [{"role": "user", "content": "a" * 300}, {"role": "assistant", "content": "b" * 300}]
    later = ask(messages=[*turns, {"role": "user", "content": "c" * 300}]).prefix
    earlier = ask(messages=turns).prefix
    assert later[: len(earlier)] == earlier and len(later) > len(earlier) > 3


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"[]", b"\xff", b"5", b"[" * 100_000, b"1" * 5000, b'{"prompt": [1e999]}', b'{"prompt": [99999999999]}',
     b'{"prompt": {"a": 1}}', b'{"messages": 5}', b'{"prompt": "\\ud800"}', b'{"prompt": [true, "a"]}'],
)  # fmt: skip
def test_bodies_without_a_prompt_have_none(body) -> None:
    assert parse_routing(body) == RoutingInfo()
