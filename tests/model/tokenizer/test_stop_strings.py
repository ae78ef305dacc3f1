"""Stop strings that spell special tokens."""

from tokenizer_files import byte_level, write_files

from model.tokenizer import load_tokenizer
from model.tokenizer.stop_strings import StopStrings, remove_marks


def test_patterns_contain_text_and_marks(tmp_path):
    tokenizer = load_tokenizer(write_files(tmp_path, byte_level(added=["<|im|>", "<|im|>x"])))
    plain = StopStrings(["a", "b"], tokenizer)
    assert plain.patterns == ("a", "b") and plain.mark(258) == ""
    stops = StopStrings(["\n<|im|>", "<|im|>x<|im|>"], tokenizer)
    short, long = stops.mark(258), stops.mark(259)
    assert len({short, long, ""}) == 3 and stops.mark(1) == ""
    assert stops.patterns == ("\n<|im|>", "<|im|>x<|im|>", "\n" + short, long + short)
    assert remove_marks(f"a{short}b{long}") == "ab"
