"""Text of one completion, for given tokens."""

from __future__ import annotations

import math

from model.tokenizer import Tokenizer
from serve.engine import SamplingParams, TokenLogprob
from serve.engine.sequence import Delta, Sequence


def complete(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], **params) -> tuple[str, str | None, list[int]]:
    """Return text, finish reason and text offsets of a completion that samples ``tokens``."""
    settings = SamplingParams(**{"max_tokens": len(tokens), "temperature": 0, "logprobs": 0, **params})
    sequence = Sequence(prompt, settings, tokenizer, deadline=math.inf)
    if not tokens:
        delta = sequence.finish_without_tokens()
        return delta.text, delta.finish_reason, []
    text, offsets = "", []
    for token in tokens:
        delta = sequence.advance(token, TokenLogprob(token, 0.0))
        text += delta.text
        offsets += [record.text_offset for record in delta.logprobs]
        if delta.final:
            return text, delta.finish_reason, offsets
    raise AssertionError("not finished")


def test_a_character_that_the_prompt_begins_belongs_to_the_completion(byte_tokenizer, byte_level, byte_fallback):
    for tokenizer in (byte_tokenizer, byte_level, byte_fallback):
        *prompt, last = tokenizer.encode("ab€")
        after = tokenizer.encode_inside("a")
        assert complete(tokenizer, prompt, [last, *after]) == ("€a", "length", [0, 1])
        assert complete(tokenizer, prompt, after) == ("\ufffda", "length", [0])
        assert complete(tokenizer, prompt, [last, *after], stop=("€",)) == ("", "stop", [])
        assert complete(tokenizer, prompt, [], max_tokens=0) == ("\ufffd", "length", [])


def test_a_stop_string_that_spells_a_special_token(byte_level):
    a, end = byte_level.encode("a")[0], byte_level.special_tokens["<|im_end|>"]
    spelled = byte_level.encode("<|im_end|>")
    for tokens, stop, expected in [
        ([a, end, a], "<|im_end|>", ("a", "stop")),
        ([a, *spelled, a], "<|im_end|>", ("a", "stop")),
        ([a, a, end, a], "a<|im_end|>", ("a", "stop")),
        ([end, a, a], "<|im_end|>a", ("", "stop")),
        ([end, end, a], "<|im_end|>a", ("", "stop")),
        ([end, a, end, end], "<|im_end|><|im_end|>", ("a", "stop")),
        ([a, end, a], "<|im_end|>b", ("aa", "length")),
        ([a, end], "<|im_end|>b", ("a", "length")),
        ([a, end, a], "im_end", ("aa", "length")),  # a special token is one unit
        ([a, byte_level.bos_id, a], "<s>", ("a", "stop")),
    ]:
        assert complete(byte_level, [0], tokens, stop=(stop,))[:2] == expected, (tokens, stop)


def test_every_declared_end_token_stops(byte_level, monkeypatch):
    a = byte_level.encode("a")[0]
    assert complete(byte_level, [0], [a, byte_level.eos_id, a])[:2] == ("a", "stop")
    assert complete(byte_level, [0], [a, 30, a])[1] == "length"
    monkeypatch.setattr(byte_level, "extra_stop_ids", frozenset({30}))
    assert complete(byte_level, [0], [a, 30, a])[:2] == ("a", "stop")


def test_joined_outputs_keep_every_part() -> None:
    records = tuple(TokenLogprob(token, -1.0) for token in range(3))
    joined = Delta.join([Delta("a", records[:2], tokens=2), Delta(tokens=1), Delta("b", records[2:], "stop", tokens=3)])
    assert joined == Delta("ab", records, "stop", tokens=6)
