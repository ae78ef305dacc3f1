"""Text of a stream of tokens equals decoding all of them at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import ByteTokenizer
from model.tokenizer.stop_strings import StopStrings
from model.tokenizer.streaming import Detokenizer, GeneratedText, finished_text

BYTES = ByteTokenizer()


def pieces_of(ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(BYTES, context or [])
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@given(st.text(max_size=40))
def test_no_incomplete_characters(text: str) -> None:
    pieces = pieces_of(BYTES.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 257), max_size=60))
def test_any_bytes_equal_decoding_at_once(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == BYTES.decode(ids)


@given(st.text(max_size=12), st.text(max_size=12))
def test_context_is_not_repeated(prompt: str, completion: str) -> None:
    assert "".join(pieces_of(BYTES.encode(completion), BYTES.encode(prompt))) == completion


def test_a_character_is_emitted_with_its_last_byte() -> None:
    assert pieces_of(BYTES.encode("a€b")) == ["a", "", "", "€", "b", ""]


def test_invalid_bytes_do_not_hold_text_back_forever() -> None:
    assert pieces_of([257] * 5) == ["\ufffd"] * 5 + [""]  # 0xFF starts no character
    assert pieces_of([0xE2 + 2] * 3) == ["", "\ufffd", "\ufffd", "\ufffd"]  # 0xE2 does


def test_a_replacement_character_in_the_text_is_not_held_back() -> None:
    assert pieces_of(BYTES.encode("\ufffd"), BYTES.encode("a\ufffd")) == ["", "", "\ufffd", ""]


@pytest.mark.parametrize("text", ["ab€", "€€€€€", "𝄞", "aé日𝄞b€"])
def test_a_context_that_ends_inside_a_character(byte_level, byte_fallback, text) -> None:
    """Check that the finished text of the context and the stream add up to the decoding of all tokens."""
    for tokenizer in (BYTES, byte_level, byte_fallback):
        ids = tokenizer.encode(text)
        for last in (len(ids), len(ids) - 1):  # with the last byte of the last character, and without it
            for cut in range(last + 1):
                detokenizer = Detokenizer(tokenizer, context=ids[:cut])
                pieces = [detokenizer.push(token) for token in ids[cut:last]]
                assert not any("\ufffd" in piece for piece in pieces)
                got = finished_text(tokenizer, ids[:cut]) + "".join(pieces) + detokenizer.flush()
                assert got == tokenizer.decode(ids[:last])


def test_special_and_unused_tokens_leave_the_context_alone(byte_fallback) -> None:
    """They must not push the text out of the window: decoding strips the space in front of the first token."""
    ids = byte_fallback.encode("a b")
    for hidden in (byte_fallback.bos_id, 5000):
        detokenizer = Detokenizer(byte_fallback, context=[*ids[:-2], *[hidden] * 20])
        assert [detokenizer.push(token) for token in [*[hidden] * 20, *ids[-2:]]] == [""] * 20 + [" ", "b"]


def test_a_tokenizer_that_joins_neighbors(letters) -> None:
    text = "the rain in the east then other"
    detokenizer = Detokenizer(letters)
    assert "".join(detokenizer.push(token) for token in letters.encode(text)) + detokenizer.flush() == text


@settings(max_examples=60)
@given(prompt=st.text("ab cd€", min_size=1, max_size=15), completion=st.text("ab €日𝄞", max_size=25))
def test_a_tokenizer_with_stripped_first_space_and_byte_fallback(byte_fallback, prompt, completion) -> None:
    before = byte_fallback.encode(prompt)
    tokens = byte_fallback.encode(prompt + completion)[len(before) :]
    detokenizer = Detokenizer(byte_fallback, context=before)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == completion
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([1, 258, *(byte + 2 for byte in "ab€".encode())]), max_size=40),
    st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3),
)
def test_generated_text_is_the_decoding_cut_before_the_first_stop_string(byte_level, ids, stops) -> None:
    text = GeneratedText(byte_level, byte_level.encode("ab"), StopStrings(stops, byte_level))
    shown = ""
    for position, token in enumerate(ids):
        piece, stopped = text.push(token)
        shown += piece
        decoded = byte_level.decode(ids[: position + 1])
        assert stopped == any(stop in decoded for stop in stops)
        if stopped:
            break
    else:
        piece, stopped = text.finish()
        shown, decoded = shown + piece, byte_level.decode(ids)
        assert not stopped
    assert shown == decoded[: min((decoded.index(stop) for stop in stops if stop in decoded), default=None)]


def test_generated_text_keeps_a_leading_space(byte_fallback) -> None:
    """Decoding on its own would strip it."""
    text = GeneratedText(byte_fallback, byte_fallback.encode("ab"), StopStrings(["d"], byte_fallback))
    found = [text.push(token) for token in byte_fallback.encode_inside(" cd")]
    assert found == [(" ", False), ("c", False), ("", True)]


def test_stop_strings_may_spell_special_tokens(byte_level) -> None:
    a = ord("a") + 2
    for tokens, stop, expected in [
        ([a, 258], "<|im_end|>", ("a", True)),
        ([a, a, 258], "a<|im_end|>", ("a", True)),
        ([258, a, 258, 258], "<|im_end|><|im_end|>", ("a", True)),
        ([a, 258, a], "im_end", ("aa", False)),
    ]:
        text = GeneratedText(byte_level, [0], StopStrings([stop], byte_level))
        pieces = [text.push(token) for token in tokens]
        assert ("".join(piece for piece, _ in pieces), pieces[-1][1]) == expected
        assert not any(stopped for _, stopped in pieces[:-1])
