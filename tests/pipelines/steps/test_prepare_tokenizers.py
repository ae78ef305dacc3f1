"""The prepare step with tokenizers read from files."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizer_files import byte_fallback, byte_level, unigram, write_files

from model.errors import ConfigError, DataError
from model.tokenizer import load_tokenizer
from pipelines.data import sources
from pipelines.data.check import check_prepared
from pipelines.data.tokenization import encode_pieces
from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.schema import Recipe
from pipelines.steps import prepare

PRINTABLE = "".join(map(chr, range(33, 127)))


def recipe(folder: Path, tokenizer: Path, documents: list[str], **data: object) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "in.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = {
        "sources": [str(corpus)],
        "sequence_length": 128,
        "pairs": 4,
        "validation_share": 0.3,
        "retrieval_validation_documents": 8,
        "tokenizer": str(tokenizer),
        **data,
    }
    return recipe_from_dict({"run": {"folder": str(folder / "runs")}, "data": settings})


def stored(result: prepare.PrepareResult, kinds: tuple[str, ...]) -> list[dict]:
    files = [shard.file for split in result.manifest.splits.values() for shard in split.shards]
    rows = [row for file in files for row in pq.read_table(result.folder / file).to_pylist()]
    return [row for row in rows if row["kind"] in kinds]


def documents(count: int = 30, text: str = "words and more words ") -> list[str]:
    return [f"{text * 20}{chr(97 + i % 26)}{'x' * i}" for i in range(count)]


def test_documents_hold_no_special_tokens_and_all_of_their_text(tmp_path):
    content = {**byte_level(), "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst"}}
    content["truncation"]["stride"] = 0
    texts = documents(text="abc</s>def<s>ghi ")
    result = prepare.run(recipe(tmp_path, write_files(tmp_path / "tokenizer", content), texts))
    tokenizer = load_tokenizer(result.folder)
    rows = stored(result, ("text",))
    assert sorted(tokenizer.decode(row["tokens"]) for row in rows) == sorted(texts)
    for row in rows:
        assert row["tokens"][0] == 0 and row["tokens"][-1] == 1
        assert not {0, 1} & set(row["tokens"][1:-1])


def test_unused_ids_count_towards_the_vocabulary_of_the_model(tmp_path):
    content = byte_level()
    content["model"]["vocab"]["w"] = 600
    made = recipe(tmp_path, write_files(tmp_path / "tokenizer", content), documents())
    result = prepare.run(made)
    assert result.manifest.vocab_size == 601
    assert max(max(row["tokens"]) for row in stored(result, ("text", "mqar", "needle"))) == 600
    assert check_prepared(made, result.manifest).model.vocab_size == 601


@pytest.mark.parametrize("kind", ["unigram", "byte_fallback", "merges"])
def test_retrieval_documents_are_written_by_any_tokenizer(tmp_path, kind):
    """A space in front of what is encoded must not come between a key and its value, and spaces stay in the filler."""
    content = {
        "unigram": unigram(PRINTABLE),
        "byte_fallback": byte_fallback(PRINTABLE),
        "merges": byte_level(merges=[("K", "7"), ("@", "K"), ("W", "o")]),
    }[kind]
    made = recipe(tmp_path, write_files(tmp_path / "tokenizer", content), documents(text="Words @K7 and words "))
    result = prepare.run(made)
    tokenizer = load_tokenizer(result.folder)
    rows = stored(result, ("mqar", "needle"))
    assert len(rows) > 20
    for row in rows:
        text = tokenizer.decode(row["tokens"])
        asked = len(row["answer_starts"])
        for start, end in zip(row["answer_starts"], row["answer_ends"]):
            value = tokenizer.decode(row["tokens"][start:end])
            question = tokenizer.decode(row["tokens"][:start])[-2:]
            assert value in "0123456789" and len(value) == 1
            assert question[0] == "@" and text.count(question + value) == 2
        assert text.count("@") == 2 * asked and "W" not in text.replace("@W", "")
        assert text.count(" ") > 5


@pytest.mark.parametrize(
    ("content", "lost"),
    [
        (unigram("abcdefghijklmnopqrstuvwxyz@"), "cannot write A B C .* Z 0 1 2 3 4 5 6 7 8 9$"),
        (unigram(PRINTABLE.replace("@", "")), "cannot write @$"),
        ({**byte_level(), "normalizer": {"type": "Lowercase"}}, "cannot write A B .* Z$"),
    ],
)
def test_a_tokenizer_that_cannot_write_facts_is_refused(tmp_path, content, lost):
    made = recipe(tmp_path, write_files(tmp_path / "tokenizer", content), documents())
    with pytest.raises(ConfigError, match=rf"data\.tokenizer: .*tokenizer: .*{lost}") as caught:
        prepare.run(made)
    assert "\n" not in str(caught.value)
    assert not made.data_folder.exists()


@pytest.mark.parametrize("chunk", [7, 40, 1 << 20])
@pytest.mark.parametrize("content", [unigram(PRINTABLE + "\n"), byte_fallback(PRINTABLE), byte_level()])
def test_chunks_of_a_document_add_no_spaces(tmp_path, monkeypatch, chunk, content):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", chunk)
    tokenizer = load_tokenizer(write_files(tmp_path, content))
    text = "some words\n  and more of them, " * 9
    chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
    [piece] = encode_pieces(tokenizer, chunks, 10_000)
    assert tokenizer.decode(piece.tolist()) == text
    assert piece[1:-1].tolist() == tokenizer.encode(text)


def test_declared_and_chosen_tokens_end_documents(tmp_path):
    names = ("<|start|>", "<|return|>")
    folder = write_files(tmp_path / "tokenizer", byte_level(names=names, added=["<|call|>"]))
    undeclared = recipe(tmp_path, folder, documents())
    with pytest.raises(ConfigError, match=r"^data\.eos_token: must be given, because no end-of-sequence token"):
        prepare.run(undeclared)
    chosen = recipe(tmp_path, folder, documents(), eos_token="<|call|>", bos_token="<|start|>")
    result = prepare.run(chosen)
    assert all(row["tokens"][-1] == 258 for row in stored(result, ("text",)))
    assert load_tokenizer(result.folder).eos_token == "<|call|>"  # also when trained and served
    check_prepared(chosen, result.manifest)
    assert prepare.run(chosen).reused

    write_files(folder, json.loads((folder / "tokenizer.json").read_text()), tokenizer_config={"eos_token": names[1]})
    with pytest.raises(DataError, match="eos_id 258 there and 1 here"):
        prepare.run(undeclared)
    with pytest.raises(ConfigError, match=r"data\.eos_token: is ID 1, but .* was prepared with ID 258"):
        check_prepared(recipe(tmp_path, folder, documents(), bos_token=names[0]), result.manifest)
    other = recipe(tmp_path, folder, documents(), eos_token=names[1], name="other")
    assert all(row["tokens"][-1] == 1 for row in stored(prepare.run(other), ("text",)))


def test_characters_that_the_tokenizer_lacks_are_reported(tmp_path, capsys):
    texts = [*documents(), "naïve é"]
    prepare.run(recipe(tmp_path / "a", write_files(tmp_path / "tokenizer", unigram(PRINTABLE)), texts))
    assert "does not have 2 characters of the text, among them é ï\n" in capsys.readouterr().out
    prepare.run(recipe(tmp_path / "b", write_files(tmp_path / "level", byte_level()), texts))
    assert "does not have" not in capsys.readouterr().out


def test_text_that_the_tokenizer_cannot_encode_is_named(tmp_path):
    folder = write_files(tmp_path / "tokenizer", unigram(PRINTABLE + "\n", unknown=False))
    made = recipe(tmp_path, folder, [*documents(), "é" * 30])
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot encode 'é' "):
        prepare.run(made)
    assert not made.data_folder.exists()


def test_bpe_dropout_changes_no_shard(tmp_path):
    content = byte_level(merges=[("w", "o"), ("wo", "r"), ("m", "o"), ("d", "s")])
    content["model"]["dropout"] = 0.5
    folder = write_files(tmp_path / "tokenizer", content)
    results = [prepare.run(recipe(tmp_path, folder, documents(), name=name)) for name in ("a", "b")]
    first, second = ([shard.sha256 for shard in result.manifest.splits["train"].shards] for result in results)
    assert first == second


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }", "{{ messages | nonsense_filter }}"])
def test_a_malformed_chat_template_is_refused_before_anything_is_written(tmp_path, template):
    folder = write_files(tmp_path / "tokenizer", byte_level(), tokenizer_config={"chat_template": template})
    made = recipe(tmp_path, folder, documents())
    with pytest.raises(ConfigError, match=r"data\.tokenizer: chat template tokenizer_config\.json: line 1: ") as caught:
        prepare.run(made)
    assert "\n" not in str(caught.value) and not made.data_folder.exists()


@pytest.mark.parametrize(
    "template", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if a %}" * 200 + "{% endif %}" * 200]
)
def test_a_chat_template_nested_too_deeply_is_named(tmp_path, template):
    folder = write_files(tmp_path / "tokenizer", byte_level(), tokenizer_config={"chat_template": template})
    with pytest.raises(ConfigError, match=r"chat template tokenizer_config\.json: cannot be compiled"):
        prepare.run(recipe(tmp_path, folder, documents()))


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_chosen_token_that_does_not_exist_is_blamed_on_its_own_key(tmp_path, role):
    folder = write_files(tmp_path / "tokenizer", byte_level())
    for tokenizer in (folder, "byte"):
        with pytest.raises(ConfigError, match=rf"^data\.{role}: '<nowhere>' is not a token of"):
            prepare.run(recipe(tmp_path, tokenizer, documents(), **{role: "<nowhere>"}))


def test_the_summary_counts_in_plain_words(tmp_path, capsys):
    prepare.run(recipe(tmp_path, "byte", ["one document only " * 40]))
    printed = capsys.readouterr().out
    assert "1 document (" in printed and "bytes of text)" in printed and "in 1 shard\n" in printed


def test_a_missing_end_of_sequence_is_asked_for_by_the_key_of_the_recipe(tmp_path):
    folder = write_files(tmp_path / "tokenizer", byte_level(names=("<a>", "<b>")))
    with pytest.raises(ConfigError, match=r"^data\.eos_token: must be given, because no end-of-sequence token"):
        prepare.run(recipe(tmp_path, folder, documents()))
