"""The byte tokenizer and its ``tokenizer.json``."""

import random

from tokenizers import Tokenizer as Backend

from model.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TEXTS = ["", "a b\n\tc\r", "naïve 漢字 😀", "\x00\x7f\xad\xa0", " two  spaces ", "".join(map(chr, range(0x300)))]


def test_the_tokenizers_library_reads_the_saved_file_with_equal_ids(tmp_path):
    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size
    assert (theirs.token_to_id(ours.bos_token), theirs.token_to_id(ours.eos_token)) == (0, 1)
    noise = bytes(random.Random(0).randrange(256) for _ in range(2000)).decode("utf-8", errors="replace")
    for text in [*TEXTS, noise]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_a_saved_byte_tokenizer_loads_as_one_and_encodes_special_spellings_as_text(tmp_path):
    ByteTokenizer().save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteTokenizer)
    assert 0 not in again.encode(again.bos_token)


def test_the_byte_tokenizer_parses_special_tokens_on_request():
    ours = ByteTokenizer()
    text = f"{ours.bos_token}a€{ours.eos_token}{ours.eos_token}b"
    assert ours.encode(text, parse_special=True) == [0, *ours.encode("a€"), 1, 1, *ours.encode("b")]
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode_prompt(text, parse_special=True)[:2] == [0, ord("a") + 2]
    assert ours.encode_prompt(text)[:2] == [0, ours.encode("<")[0]]


def test_an_unfinished_character_is_recognized_as_by_decoding_every_continuation():
    tokenizer, chance = ByteTokenizer(), random.Random(0)
    leads = [0x41, 0x80, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0x9F, 0xA0, 0x90, 0x8F]
    found = set()
    for _ in range(5000):
        ids = [chance.choice([chance.randrange(258), chance.choice(leads) + 2]) for _ in range(chance.randrange(7))]
        text = tokenizer.decode(ids)
        expected = Tokenizer.ends_inside_character(tokenizer, ids, text)
        assert tokenizer.ends_inside_character(ids, text) == expected, ids
        found.add(expected)
    assert found == {False, True}
