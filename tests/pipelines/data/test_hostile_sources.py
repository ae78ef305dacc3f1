"""Source files of any content: they become documents, or one sentence names the file."""

import encodings.aliases
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.errors import DataError
from pipelines.data import sources
from pipelines.data.source_files import find_files
from pipelines.data.sources import read_documents


def read(path: Path, field: str = "text") -> list[str]:
    return ["".join(document.open()) for document in read_documents(find_files((str(path),), 0), field)]


def refusal(path: Path, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(path, field)
    message = str(caught.value)
    assert message.startswith(f"data.sources: {path}")
    message.encode()
    return message.removeprefix(f"data.sources: {path}")


@pytest.mark.parametrize(
    "codec", sorted({*encodings.aliases.aliases.values(), "undefined", "idna", "punycode", "aliases"})
)
def test_any_declared_codec_is_decoded_or_refused_by_name(tmp_path, codec):
    path = tmp_path / "a.py"
    path.write_bytes(f"# -*- coding: {codec} -*-\nx = 1\n".encode())
    try:
        assert read(path)[0].encode()
    except DataError as error:
        assert str(error).startswith(f"data.sources: {path}: ")


@pytest.mark.parametrize("codec", ["hex", "rot13", "base64", "bz2", "zip", "uu", "quopri"])
def test_codecs_that_are_not_for_text_are_named(tmp_path, codec):
    (tmp_path / "a.py").write_bytes(f"# coding: {codec}\nx = 1\n".encode())
    assert f"'{codec}' is not a text encoding" in refusal(tmp_path / "a.py")


@pytest.mark.parametrize("codec", ["unknown-codec", "encodings.hex", "..", "x" * 1000])
def test_unknown_codecs_are_named(tmp_path, codec):
    (tmp_path / "a.py").write_bytes(f"# coding: {codec}\nx = 1\n".encode())
    assert refusal(tmp_path / "a.py").startswith(": is not text (unknown encoding")


def test_declared_text_encodings_are_decoded(tmp_path):
    for codec in ("latin-1", "cp1252", "iso-8859-15", "koi8-r", "utf-8", "shift_jis"):
        text = f"# coding: {codec}\nx = '{'я' if codec in ('koi8-r', 'utf-8') else 'x'}'\n"
        (tmp_path / "a.py").write_bytes(text.encode(codec))
        assert read(tmp_path / "a.py") == [text]
    (tmp_path / "a.py").write_bytes(b"# coding: utf-7\n+2AA-\n")  # a lone surrogate
    assert "surrogates not allowed" in refusal(tmp_path / "a.py")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, suffix, codec):
    text = "naïve €😀\r\nline\rend"
    (tmp_path / f"a{suffix}").write_bytes(text.encode(codec))
    assert read(tmp_path / f"a{suffix}") == [text]
    if codec != "utf-8-sig":
        big = b"\xfe\xff" if codec == "utf-16" else b"\0\0\xfe\xff"
        (tmp_path / f"a{suffix}").write_bytes(big + text.encode(f"{codec}-be"))
        assert read(tmp_path / f"a{suffix}") == [text]


@pytest.mark.parametrize(
    "content",
    [
        "naïve".encode("latin-1"),
        b"\x1f\x8b\x08\0\0\0\0\0",
        b"PK\x03\x04\x14\0\0\0\x08\0\xff",
        b"\x7fELF\x02\x01\x01\0",
        b"text\0text",
        "no mark".encode("utf-16-le"),
        b"\xff\xfea",
        b"\xed\xa0\x80",
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".py"])
def test_a_file_that_is_not_text_is_named(tmp_path, content, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    found = refusal(tmp_path / f"a{suffix}")
    assert found.startswith(": is not text (") and "codec" not in found


def test_a_huge_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(sources, "_LINE_BYTES", 64)
    for suffix in (".txt", ".py"):
        (tmp_path / f"a{suffix}").write_text("é" * 1001)
        (file,) = find_files((f"{tmp_path}/a{suffix}",), 0)
        chunks = list(next(read_documents([file], "text")).open())
        assert "".join(chunks) == "é" * 1001 and max(map(len, chunks)) <= 200


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.jsonl", "a.parquet"])
def test_a_file_that_vanishes_is_named(tmp_path, name):
    path = tmp_path / name
    pq.write_table(pa.table({"text": ["x"]}), path)
    files = find_files((str(path),), 0)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        [list(document.open()) for document in read_documents(files, "text")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\\ud800"}', ":1: not valid Unicode"),
        (b'{"text": "\xed\xa0\x80"}', ":1: not valid Unicode"),
        (b'{"text": "\xff"}', ":1: not a JSON record"),
        (b'{"text": ' + b"[" * 100_000, ":1: not a JSON record"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", ":1: not a JSON record"),
        (b'{"\\ud800": 1}', r":1: has no field 'text' (data.text_field), only '\ud800'"),
        (b"\x1f\x8b\x08\0", ":1: not a JSON record"),
        ('{"text": "x"}'.encode("utf-16"), ": is not text"),
        ('{"text": "x"}'.encode("utf-16-le"), ":1: not a JSON record"),
        (b'{"text": ["x"]}', ":1: the text is a list, not a string"),
        (b"null", ":1: expected a JSON object, found null"),
        (b'{"' + b"k" * 10_000 + b'": 1}', ":1: has no field 'text'"),
    ],
)
def test_damaged_json_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    found = refusal(tmp_path / "a.jsonl")
    assert found.startswith(message) and len(found) < 400


def test_json_text_may_hold_any_character(tmp_path):
    texts = ["nul \0 in a record", "\u2028", "\x85", "", "   ", "😀"]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps({"text": text}) for text in texts))
    assert read(tmp_path / "a.jsonl") == texts


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_json_records_are_decoded_by_their_byte_order_mark(tmp_path, codec):
    texts = ["naïve €😀\r\nline", "\u2028 \x85", "second"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    mark = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff"}.get(codec, b"")
    (tmp_path / "a.jsonl").write_bytes(mark + lines.encode(codec))
    assert read(tmp_path / "a.jsonl") == texts
    (tmp_path / "a.jsonl").write_bytes(mark + (lines + "\n\n[").encode(codec))
    assert refusal(tmp_path / "a.jsonl").startswith(":5: not a JSON record")


def test_unmarked_utf_16_records_are_refused_with_advice(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16-le"))
    assert "UTF-16 and UTF-32 need a byte order mark" in refusal(tmp_path / "a.jsonl")


def parquet(path: Path, *arrays: pa.Array, names=("text",)) -> Path:
    pq.write_table(pa.Table.from_arrays(list(arrays), names=list(names)), path)
    return path


def raw_text(*values: bytes) -> pa.Array:
    """Text that is not valid UTF-8, which Arrow does not check."""
    binary = pa.array(list(values), pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def test_parquet_text_that_is_not_unicode_is_named(tmp_path):
    for value in (b"\xed\xa0\x80", b"\xff"):
        assert "not a readable Parquet file" in refusal(parquet(tmp_path / "a.parquet", raw_text(b"x", value)))


def test_odd_parquet_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    two = parquet(path, pa.array(["a"]), pa.array(["b"]), names=("text", "text"))
    assert "has 2 columns 'text'" in refusal(two)
    assert "holds struct" in refusal(parquet(path, pa.array([{"a": "x"}])))
    assert "holds binary" in refusal(parquet(path, pa.array([b"x"])))
    assert read(parquet(path, pa.array(["x"]), names=("a.b",)), "a.b") == ["x"]
    assert read(parquet(path, pa.array([], pa.string()))) == []
    for cut in (0, 4, 50):
        path.write_bytes(path.read_bytes()[:cut])
        refusal(path)


@settings(max_examples=150)
@given(st.sampled_from([".txt", ".md", ".py", ".jsonl", ".parquet"]), st.binary(max_size=60))
@example(".py", b"# coding: hex")
@example(".jsonl", b'{"text": "x"}')
def test_any_bytes_are_read_or_refused_by_name(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        for text in read(path):
            text.encode()
    except DataError as error:
        assert str(error).startswith(f"data.sources: {path}")
