"""The validation split of few documents: the end of each."""

import json
import re
from pathlib import Path

import pytest

from model.errors import DataError
from model.tokenizer import ByteTokenizer
from pipelines.data import sources
from pipelines.data.local_reader import local_rows
from pipelines.data.tokenization import line_start, skip, truncate
from pipelines.recipe.loading import recipe_from_dict
from pipelines.steps import prepare

LENGTH = 64
TEXT = "".join(f"line {i} of the text, été\n" for i in range(4000))


def recipe(folder: Path, *files: Path, **data: object):
    settings = {
        "sources": [str(file) for file in files],
        "sequence_length": LENGTH,
        "pairs": 2,
        "retrieval_validation_documents": 8,
        **data,
    }
    return recipe_from_dict({"run": {"folder": str(folder / "runs")}, "data": settings})


def texts(result: prepare.PrepareResult, split: str) -> str:
    import pyarrow.parquet as pq

    shards = result.manifest.splits[split].shards
    rows = [row for shard in shards for row in pq.read_table(result.folder / shard.file).to_pylist()]
    rows = sorted((row for row in rows if row["kind"] == "text"), key=lambda row: (row["source"], row["piece"]))
    return ByteTokenizer().decode([token for row in rows for token in row["tokens"]])


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_one_file_is_split_at_a_line_near_its_end(tmp_path, capsys):
    path = write(tmp_path, "input.txt", TEXT)
    result = prepare.run(recipe(tmp_path, path))
    train, validation = texts(result, "train"), texts(result, "validation")
    assert train + validation == TEXT
    assert train.endswith("\n") and 0.94 < len(train) / len(TEXT) <= 0.95
    assert result.manifest.held_out == "ends"
    assert "validation is the end of each document" in capsys.readouterr().out
    assert next(local_rows(result.folder, "validation", LENGTH, kinds=["needle"]))
    again = prepare.run(recipe(tmp_path / "again", path))
    assert again.manifest.splits == result.manifest.splits
    assert prepare.run(recipe(tmp_path, path)).reused


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("seed", [0, 1])
def test_few_files_give_both_splits_enough_text(tmp_path, count, seed):
    """Check that neither split gets less than a quarter of its share, for many hashes."""
    files = [write(tmp_path, f"{i}.txt", TEXT[seed * 7 + i * 97 :][: 6000 + 2000 * i]) for i in range(count)]
    result = prepare.run(recipe(tmp_path, *files))
    size = {split: part.text_bytes for split, part in result.manifest.splits.items()}
    assert sum(size.values()) == sum(file.stat().st_size for file in files)
    assert 0.0125 <= size["validation"] / sum(size.values()) <= 0.7625
    assert result.manifest.splits["validation"].rows["text"] > 0


def test_ends_are_held_out_if_the_hash_would_hold_out_most_text(tmp_path):
    """A split by whole files would be possible, and would train on 1% of the text."""
    for number in range(1000):
        large = f"{number}\n{TEXT}"
        path = write(tmp_path, "large.txt", large)
        if _is_validation(large) and not _is_validation(TEXT[:1000]):
            break
    result = prepare.run(recipe(tmp_path, path, write(tmp_path, "small.txt", TEXT[:1000])))
    size = {split: part.text_bytes for split, part in result.manifest.splits.items()}
    assert result.manifest.held_out == "ends"
    assert 0.04 < size["validation"] / sum(size.values()) < 0.06


def _is_validation(text: str) -> bool:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < 0.05 * 2**64


def test_a_jsonl_file_with_one_record_is_split(tmp_path):
    path = write(tmp_path, "one.jsonl", json.dumps({"text": TEXT}) + "\n")
    result = prepare.run(recipe(tmp_path, path, max_text_bytes=50_000))
    assert TEXT.startswith(texts(result, "train") + texts(result, "validation"))
    assert sum(part.text_bytes for part in result.manifest.splits.values()) == 50_000


def test_the_split_does_not_depend_on_the_chunk_size(tmp_path, monkeypatch):
    path = write(tmp_path, "input.txt", TEXT[:20_000])
    first = prepare.run(recipe(tmp_path / "a", path))
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 11)
    assert prepare.run(recipe(tmp_path / "b", path)).manifest.splits == first.manifest.splits


def test_a_single_line_is_cut_between_characters(tmp_path):
    text = "é" * 10_000
    result = prepare.run(recipe(tmp_path, write(tmp_path, "input.txt", text), validation_share=0.33333))
    assert texts(result, "train") + texts(result, "validation") == text
    assert 0.66 < len(texts(result, "train")) / len(text) < 0.67


@pytest.mark.parametrize("text", ["", "\n", "a", "é", "ab\ncd\nef", "€€€", "x\n" * 50, "no line at all"])
def test_the_two_parts_join_to_the_text(text):
    encoded = text.encode()
    for chunk in (1, 3, 100):
        chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
        for place in range(len(encoded) + 1):
            start = line_start(iter(chunks), place)
            assert "".join(truncate(iter(chunks), start)) + "".join(skip(iter(chunks), start)) == text
            line = encoded[:place].rfind(b"\n") + 1
            assert start == line if line > place // 2 else place - 3 <= start <= place


def test_too_little_text_is_refused_with_advice(tmp_path):
    made = recipe(tmp_path, write(tmp_path, "input.txt", TEXT[:600]))
    with pytest.raises(DataError) as caught:
        prepare.run(made)
    message = str(caught.value)
    assert re.search(r"too little text for validation \(\d+ bytes, for rows of 64 tokens\); add text, raise", message)
    assert not made.data_folder.exists()
    prepare.run(recipe(tmp_path, tmp_path / "input.txt", validation_share=0.4))


@pytest.mark.parametrize("text", ["", " \n\t ", "\r\n" * 3])
def test_empty_and_blank_files_are_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"no text in 1 file|too little text for"):
        prepare.run(recipe(tmp_path, write(tmp_path, "input.txt", text)))
