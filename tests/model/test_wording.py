"""Values and counts in messages."""

import math

import pytest

from model.wording import count, json_type, quote, quote_json


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("True", "'True'"),
        (1.5, "1.5"),
        (-math.inf, "-.inf"),
        (math.nan, ".nan"),
        ((1, None), "[1, null]"),
        ({"a": [False]}, "{'a': [false]}"),
    ],
)
def test_values_of_a_recipe_are_quoted_in_yaml(value, text):
    assert quote(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (False, "false"),
        ("a\nb", '"a\\nb"'),
        ([], "[]"),
        ([1, None], "[1, null]"),
        ([0] * 1000, "a list"),
        ({"a": "b" * 1000}, "an object"),
    ],
)
def test_values_of_json_are_quoted_in_json(value, text):
    assert quote_json(value) == text


@pytest.mark.parametrize("shortened", [quote, quote_json])
def test_long_values_are_shortened(shortened):
    for value in ("a" * 10_000, 10**1000, [0] * 10_000):
        assert len(shortened(value)) < 250


def test_types_of_json_have_an_article():
    assert [json_type(v) for v in (None, True, 1, "a", [], {})] == [
        "null", "a boolean", "a number", "a string", "a list", "an object",
    ]  # fmt: skip


def test_nouns_agree_with_their_number():
    assert [count(n, "shard") for n in (0, 1, 2000, 0.5, 1.0)] == [
        "0 shards", "1 shard", "2,000 shards", "0.5 shards", "1 shard",
    ]  # fmt: skip
