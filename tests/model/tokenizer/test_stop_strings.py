"""Stop strings: those that spell special tokens, and those that span pieces of text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import byte_level, write_files

from model.tokenizer import load_tokenizer
from model.tokenizer.stop_strings import StopStringFilter, StopStrings, remove_marks


def test_patterns_contain_text_and_marks(tmp_path):
    tokenizer = load_tokenizer(write_files(tmp_path, byte_level(added=["<|im|>", "<|im|>x"])))
    plain = StopStrings(["a", "b"], tokenizer)
    assert plain.patterns == ("a", "b") and plain.mark(258) == ""
    stops = StopStrings(["\n<|im|>", "<|im|>x<|im|>"], tokenizer)
    short, long = stops.mark(258), stops.mark(259)
    assert len({short, long, ""}) == 3 and stops.mark(1) == ""
    assert stops.patterns == ("\n<|im|>", "<|im|>x<|im|>", "\n" + short, long + short)
    assert remove_marks(f"a{short}b{long}") == "ab"


def filter_stops(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    stop_filter = StopStringFilter(stops)
    out = []
    for piece in pieces:
        text, stopped = stop_filter.push(piece)
        out.append(text)
        if stopped:
            return out, True
    return [*out, stop_filter.flush()], False


@settings(max_examples=300)
@given(st.lists(st.text("ab", max_size=3), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_across_any_pieces(pieces: list[str], stop: str) -> None:
    text = "".join(pieces)
    out, stopped = filter_stops(pieces, [stop])
    assert stopped == (stop in text)
    assert "".join(out) == text.split(stop)[0]


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_several_stop_strings_are_never_emitted(text: str, stops: list[str]) -> None:
    out, stopped = filter_stops(list(text), stops)
    assert stopped == any(stop in text for stop in stops)
    assert not any(stop in "".join(out) for stop in stops)


@pytest.mark.parametrize(("pieces", "sent"), [("xEN", ["x", "", ""]), ("xEy", ["x", "", "Ey"])])
def test_only_a_possible_stop_string_is_held_back(pieces: str, sent: list[str]) -> None:
    stop_filter = StopStringFilter(["END"])
    assert [stop_filter.push(piece)[0] for piece in pieces] == sent
