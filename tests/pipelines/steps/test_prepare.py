import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import ConfigError, DataError
from model.tokenizer import ByteTokenizer, load_tokenizer
from pipelines.data import shard_writer, sources
from pipelines.data.check import check_prepared
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest
from pipelines.data.packing import TargetKind
from pipelines.data.shard_writer import PIECE_ROWS
from pipelines.data.shards import SHARD_SCHEMA
from pipelines.data.tokenization import encode
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.steps import prepare

LENGTH = 128
TOKENIZER = ByteTokenizer()


def recipe(folder: Path, *sources: object, **data: object) -> Recipe:
    settings = {
        "sources": [str(source) for source in sources],
        "sequence_length": LENGTH,
        "pairs": 4,
        "validation_share": 0.3,
        "retrieval_validation_documents": 20,
        **data,
    }
    return recipe_from_dict({"run": {"folder": str(folder / "runs")}, "data": settings})


def texts(count: int, words: int = 150) -> list[str]:
    """Documents that each repeat a word of their own, which identifies slices of their text."""
    letters = str.maketrans("0123456789", "abcdefghij")  # fillers hold no digits
    return [f"word{i:05d} ".translate(letters) * words for i in range(count)]


def write_corpus(folder: Path, documents: list[str], suffix: str = ".txt") -> Path:
    folder.mkdir(parents=True)
    for i, text in enumerate(documents):
        (folder / f"{i:05d}{suffix}").write_text(text, newline="")
    return folder / f"*{suffix}"


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents))
    return path


def stored(result: prepare.PrepareResult, split: str) -> list[dict]:
    shards = result.manifest.splits[split].shards
    tables = [pq.read_table(result.folder / shard.file) for shard in shards]
    return [row for table in tables for row in table.to_pylist()]


def documents(rows: list[dict]) -> dict[str, str]:
    """Return texts by document id, joined from their pieces."""
    found: dict[str, list[tuple[int, list[int]]]] = {}
    for row in rows:
        if row["kind"] == "text":
            found.setdefault(row["document_id"], []).append((row["piece"], row["tokens"]))
    joined = {}
    for name, pieces in found.items():
        ordered = [tokens for _, tokens in sorted(pieces)]
        assert all(tokens[0] == TOKENIZER.bos_id for tokens in ordered)
        assert [tokens[-1] == TOKENIZER.eos_id for tokens in ordered] == [False] * (len(ordered) - 1) + [True]
        joined[name] = TOKENIZER.decode([token for tokens in ordered for token in tokens])
    return joined


def hashes(result: prepare.PrepareResult) -> list[str]:
    return [shard.sha256 for split in result.manifest.splits.values() for shard in split.shards]


# --- shard content


def test_same_settings_give_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "in", texts(60))
    first = prepare.run(recipe(tmp_path / "a", corpus, shard_tokens=30_000))
    second = prepare.run(recipe(tmp_path / "b", corpus, shard_tokens=30_000))
    other = prepare.run(recipe(tmp_path / "c", corpus, shard_tokens=30_000, seed=5))
    assert len(first.manifest.splits["train"].shards) > 3
    assert hashes(first) == hashes(second)
    assert not set(hashes(first)) & set(hashes(other))


def test_the_split_follows_the_text_alone(tmp_path):
    content = texts(80)
    by_file = prepare.run(recipe(tmp_path / "a", write_corpus(tmp_path / "in", content)))
    random.Random(0).shuffle(content)
    by_record = prepare.run(recipe(tmp_path / "b", write_jsonl(tmp_path / "in.jsonl", content[:70]), seed=9))
    for split in ("train", "validation"):
        kept = set(content[:70])
        assert {text for text in documents(stored(by_file, split)).values() if text in kept} == set(
            documents(stored(by_record, split)).values()
        )
    assert 10 <= by_file.manifest.splits["validation"].documents["text"] <= 40


def test_documents_come_back_whole(tmp_path):
    long = "".join(f"{i} ünïcode €\r\n" for i in range(3000)) + "the end"
    content = [*texts(20), long, "x", "two\rlines\n"]
    result = prepare.run(recipe(tmp_path, write_corpus(tmp_path / "in", content), shard_tokens=10_000))
    train, validation = (documents(stored(result, split)) for split in ("train", "validation"))
    assert sorted([*train.values(), *validation.values()]) == sorted(content)
    assert not train.keys() & validation.keys()
    assert result.manifest.splits["train"].text_bytes == sum(len(text.encode()) for text in train.values())
    assert pq.read_schema(result.folder / "train/00000.parquet").equals(SHARD_SCHEMA)


def test_chunks_join_to_the_same_document(tmp_path, monkeypatch):
    content = [*texts(20), "".join(f"line {i} é\n" for i in range(500))]
    corpus = write_corpus(tmp_path / "in", content)
    whole = prepare.run(recipe(tmp_path / "a", corpus))
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 7)
    assert hashes(prepare.run(recipe(tmp_path / "b", corpus))) == hashes(whole)


def test_retrieval_documents_are_planted_in_text_of_their_own_split(tmp_path):
    corpus = write_corpus(tmp_path / "in", texts(60))
    result = prepare.run(recipe(tmp_path, corpus, shard_tokens=20_000))
    words = {
        split: set(re.findall(r"word[a-j]{5}", " ".join(documents(stored(result, split)).values())))
        for split in ("train", "validation")
    }
    assert not words["train"] & words["validation"]
    for split in ("train", "validation"):
        planted = [row for row in stored(result, split) if row["kind"] != "text"]
        found = {word for row in planted for word in re.findall(r"word[a-j]{5}", TOKENIZER.decode(row["tokens"]))}
        assert found and found <= words[split]
    train, validation = (
        {row["document_id"] for row in stored(result, split) if row["kind"] != "text"}
        for split in ("train", "validation")
    )
    assert not train & validation


def test_retrieval_answers_are_what_was_planted_outside_the_window(tmp_path):
    made = recipe(tmp_path, write_corpus(tmp_path / "in", texts(60)))
    rows = [row for row in stored(prepare.run(made), "train") if row["kind"] != "text"]
    assert {row["kind"] for row in rows} == {"mqar", "needle"}
    for row in rows:
        tokens, spans = row["tokens"], list(zip(row["answer_starts"], row["answer_ends"]))
        assert len(tokens) == LENGTH and tokens[0] == TOKENIZER.bos_id
        if row["kind"] == "needle":
            assert len(spans) == 1
        else:
            facts = {TOKENIZER.decode(tokens[start - 2 : end]) for start, end in spans}
            assert 2 <= len(facts) <= made.data.pairs
            assert len(spans) % len(facts) == 0 and len(spans) // len(facts) <= made.data.rounds
        first_question = spans[0][0] - 2
        for start, end in spans:
            fact = TOKENIZER.decode(tokens[start - 2 : end])
            assert re.fullmatch(r"@[A-Z][0-9]", fact)
            assert fact in TOKENIZER.decode(tokens[: first_question - made.model.window])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_retrieval_share_is_a_share_of_all_train_rows(tmp_path, share, packing):
    corpus = write_corpus(tmp_path / "in", [*texts(40), *texts(160, words=8)])
    result = prepare.run(recipe(tmp_path, corpus, retrieval_share=share, shard_tokens=20_000, packing=packing))
    rows = result.manifest.splits["train"].rows
    total, generated = sum(rows.values()), rows["mqar"] + rows["needle"]
    assert abs(generated - share * total) <= 1
    assert abs(rows["needle"] - 0.25 * generated) <= 4 * np.sqrt(generated * 0.25 * 0.75)
    validation = result.manifest.splits["validation"].rows
    assert validation["mqar"] + validation["needle"] == 20
    assert validation["text"] > 0


def test_packing_fills_rows_with_short_documents_and_the_report_says_how_full(tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "in.jsonl", [text for i in range(2, 8) for text in texts(100, words=i)])
    full = {}
    for packing in (True, False):
        result = prepare.run(recipe(tmp_path / str(packing), corpus, packing=packing))
        train = result.manifest.splits["train"]
        full[packing] = train.targets["text"] / (train.rows["text"] * LENGTH)
        assert result.manifest.packing == packing
        assert f"{train.rows['text']:,} text ({full[packing]:.1%} full)" in capsys.readouterr().out
    assert full[True] > 0.93 and full[False] < 0.5


def test_shards_are_mixed(tmp_path):
    corpus = write_corpus(tmp_path / "in", texts(300))
    result = prepare.run(recipe(tmp_path, corpus, shard_tokens=100_000))
    kinds = [TargetKind.TEXT in row["target_kind"] for row in local_rows(result.folder, "train", LENGTH)]
    shares = [np.mean(kinds[start : start + 256]) for start in range(0, len(kinds) - 256, 256)]
    assert len(shares) > 8
    assert min(shares) > 0.3 and max(shares) < 0.7


def test_every_shard_draws_on_the_whole_corpus(tmp_path):
    result = prepare.run(recipe(tmp_path, write_corpus(tmp_path / "in", texts(100)), shard_tokens=30_000))
    names = [f"{i:05d}.txt" for i in range(100)]
    for shard in result.manifest.splits["train"].shards[:-1]:
        sources = pq.read_table(result.folder / shard.file)["source"].to_pylist()
        found = {Path(source).name for source in sources} - {"generated"}
        assert found & set(names[:50]) and found & set(names[50:])


def test_shards_close_at_shard_tokens_and_row_groups_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "ROW_GROUP_TOKENS", 4096)
    corpus = write_corpus(tmp_path / "in", texts(100))
    result = prepare.run(recipe(tmp_path, corpus, shard_tokens=20_000))
    *full, _ = result.manifest.splits["train"].shards
    piece = PIECE_ROWS * LENGTH + 2
    assert all(20_000 - LENGTH <= shard.tokens <= 20_000 + 2 * piece for shard in full)
    file = pq.ParquetFile(result.folder / full[0].file)
    groups = [file.read_row_group(i)["tokens"].to_pylist() for i in range(file.num_row_groups)]
    assert max(sum(map(len, group)) for group in groups) <= 4096 + piece


# --- sources


def test_formats_and_globs(tmp_path):
    content = texts(70)
    (tmp_path / "deep/er").mkdir(parents=True)
    for i, suffix in enumerate((".txt", ".md", ".TXT")):
        (tmp_path / f"deep/er/{i}{suffix}").write_text(content[i])
    write_jsonl(tmp_path / "deep/a.jsonl", content[10:20], field="body")
    columns = {
        "plain": pa.array([*content[20:30], None, ""]),
        "large": pa.array(content[30:40], pa.large_string()),
        "coded": pa.array(content[40:50]).dictionary_encode(),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"id": range(len(column)), "body": column}), tmp_path / f"deep/{name}.parquet")
    made = recipe(tmp_path, tmp_path / "**/*.*", tmp_path / "deep/*.jsonl", text_field="body")
    result = prepare.run(made)
    found = [text for split in ("train", "validation") for text in documents(stored(result, split)).values()]
    assert sorted(found) == sorted(content[:3] + content[10:50])
    sources = {row["source"] for row in stored(result, "train") + stored(result, "validation")}
    assert {str(tmp_path / "deep/er/0.txt"), str(tmp_path / "deep/a.jsonl:1")} <= sources


def test_python_files_are_read_in_the_encoding_they_declare(tmp_path):
    corpus = write_corpus(tmp_path / "in", texts(60), suffix=".py")
    (tmp_path / "in/latin.py").write_bytes("# -*- coding: latin-1 -*-\nnäme = 1\n".encode("latin-1"))
    (tmp_path / "in/marked.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    result = prepare.run(recipe(tmp_path, corpus))
    found = {text for split in ("train", "validation") for text in documents(stored(result, split)).values()}
    assert {"# -*- coding: latin-1 -*-\nnäme = 1\n", "x = 1\n"} <= found


def test_the_standard_library_is_the_default(tmp_path):
    result = prepare.run(recipe(tmp_path, max_text_bytes=300_000))
    rows = stored(result, "train")
    assert all(row["source"].startswith("stdlib/") for row in rows if row["kind"] == "text")
    assert not any("/test/" in row["source"] or "site-packages" in row["source"] for row in rows)
    total = sum(part.text_bytes for part in result.manifest.splits.values())
    assert 300_000 - 4 < total <= 300_000


@pytest.mark.parametrize("limit", range(30_000, 30_004))
def test_max_text_bytes_cuts_between_characters(tmp_path, limit):
    corpus = write_jsonl(tmp_path / "in.jsonl", [f"€{i}" * 150 for i in range(100)])
    result = prepare.run(recipe(tmp_path, corpus, max_text_bytes=limit))
    found = [text for split in ("train", "validation") for text in documents(stored(result, split)).values()]
    size = sum(len(text.encode()) for text in found)
    assert limit - 4 < size <= limit
    assert size == sum(part.text_bytes for part in result.manifest.splits.values())


def test_a_hugging_face_tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    content = [f"some words and number {i} " * 80 for i in range(60)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(content, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    corpus = write_corpus(tmp_path / "in", content)
    prepared = recipe(tmp_path, corpus, tokenizer=str(tmp_path / "tokenizer.json"))
    result = prepare.run(prepared)
    damaged = result.folder / "tokenizer.json"
    whole = damaged.read_text()
    damaged.write_text(whole + "\n")
    with pytest.raises(DataError, match=r"tokenizer\.json: missing or damaged"):
        check_prepared(prepared, result.manifest)
    damaged.write_text(whole)
    there = with_overrides(prepared, {"data.tokenizer": str(result.folder)})
    assert check_prepared(there, result.manifest).model.vocab_size == result.manifest.vocab_size
    with pytest.raises(ConfigError, match=r"data\.tokenizer: byte, but .* was prepared with .*tokenizer\.json"):
        check_prepared(with_overrides(prepared, {"data.tokenizer": "byte"}), result.manifest)
    tokenizer = load_tokenizer(result.folder)
    assert result.manifest.vocab_size == tokenizer.vocab_size == backend.get_vocab_size()
    row = next(row for row in stored(result, "train") if row["kind"] == "text" and row["piece"] == 0)
    assert row["tokens"][0] == tokenizer.bos_id == result.manifest.bos_id
    assert tokenizer.decode(row["tokens"]) in content
    assert max(len(row["tokens"]) for row in stored(result, "train") if row["kind"] != "text") == LENGTH


def test_bytes_take_the_tokenizer_s_own_ids():
    text = "any tëxt\0\x7f€😀"
    assert encode(TOKENIZER, text).tolist() == TOKENIZER.encode(text)


MEMORY_PROBE = """
import resource, sys
from pipelines.steps import prepare
from pipelines.recipe.loading import recipe_from_dict
settings = {"sources": sys.argv[2:], "shard_tokens": 500_000, "retrieval_share": 0.01}
prepare.run(recipe_from_dict({"run": {"folder": sys.argv[1]}, "data": settings}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_input(tmp_path):
    """24 MB in a .jsonl and a .txt file against 3 MB. In memory they would be 144 MB of tokens."""

    def peak_megabytes(name: str, megabytes: int) -> int:
        rng = random.Random(0)
        line = "".join(rng.choice("abcdefg \n") for _ in range(100_000))
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(20 * megabytes // 2):
                file.write(json.dumps({"text": f"{i} {line}"}) + "\n")
        with (tmp_path / f"{name}.txt").open("w") as file:
            for _ in range(10 * megabytes // 2):
                file.write(line)
        sources = [str(tmp_path / f"{name}{suffix}") for suffix in (".jsonl", ".txt")]
        command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / name), *sources]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    small, large = peak_megabytes("small", 3), peak_megabytes("large", 24)
    assert large - small < 40


# --- the folder


def test_the_manifest_says_what_is_there(tmp_path):
    made = recipe(tmp_path, write_corpus(tmp_path / "in", texts(60)), shard_tokens=20_000)
    result = prepare.run(made)
    assert result.folder == made.data_folder and not result.reused
    manifest = read_manifest(result.folder, verify=True)
    assert manifest == result.manifest
    assert manifest.settings["window"] == made.model.window
    assert (manifest.vocab_size, manifest.sequence_length) == (258, LENGTH)
    for split, part in manifest.splits.items():
        rows = stored(result, split)
        for kind in ("text", "mqar", "needle"):
            of_kind = [row for row in rows if row["kind"] == kind]
            assert part.documents[kind] == len({row["document_id"] for row in of_kind})
            assert part.tokens[kind] == sum(len(row["tokens"]) for row in of_kind)
            cut = list(local_rows(result.folder, split, LENGTH, kinds=[kind]))
            assert part.rows[kind] == len(cut)
            assert part.targets[kind] == sum(int((row["target_kind"] > 0).sum()) for row in cut)
        assert sum(shard.documents for shard in part.shards) == len(rows)
        assert sum(shard.tokens for shard in part.shards) == sum(part.tokens.values())
    assert load_tokenizer(result.folder).vocab_size == 258
    assert [path.name for path in result.folder.parent.iterdir()] == [result.folder.name]


def test_the_same_settings_reuse_the_folder(tmp_path, capsys):
    made = recipe(tmp_path, write_corpus(tmp_path / "in", texts(60)))
    first = prepare.run(made)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = prepare.run(made)
    assert second.reused and second.manifest == first.manifest
    assert "Reusing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def _other_settings(folder: Path, made: Recipe) -> Recipe:
    return made.model_copy(update={"data": made.data.model_copy(update={"pairs": 3})})


def _other_packing(folder: Path, made: Recipe) -> Recipe:
    return made.model_copy(update={"data": made.data.model_copy(update={"packing": False})})


def _older_format(folder: Path, made: Recipe) -> Recipe:
    path = made.data_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["packing"]
    path.write_text(json.dumps({**manifest, "format": 1}))
    return made


def _other_window(folder: Path, made: Recipe) -> Recipe:
    return made.model_copy(update={"model": made.model.replace(window=8)})


def _grown_source(folder: Path, made: Recipe) -> Recipe:
    (folder / "in/00003.txt").write_text("another text")
    return made


def _short_shard(folder: Path, made: Recipe) -> Recipe:
    shard = made.data_folder / "train/00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    return made


def _no_manifest(folder: Path, made: Recipe) -> Recipe:
    (made.data_folder / "manifest.json").unlink()
    return made


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_settings, "pairs 4 there and 3 here"),
        (_other_window, "window 16 there and 8 here"),
        (_other_packing, "packing true there and false here"),
        (_older_format, "has format 1, this version reads format 2"),
        (_grown_source, "source files had other sizes"),
        (_short_shard, "00000.parquet: damaged token shard"),
        (_no_manifest, "holds no manifest.json"),
    ],
)
def test_another_folder_is_never_overwritten(tmp_path, change, named):
    made = recipe(tmp_path, write_corpus(tmp_path / "in", texts(60)))
    prepare.run(made)
    changed = change(tmp_path, made)
    before = {path: path.read_bytes() for path in made.data_folder.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=re.escape(named)) as caught:
        prepare.run(changed)
    assert "choose another data.name or delete the folder" in str(caught.value)
    assert {path: path.read_bytes() for path in made.data_folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in made.data_folder.parent.iterdir()] == [made.data_folder.name]


# --- user errors

GOOD_LINES = [json.dumps({"text": text}) for text in texts(60)]


def _file(name: str, content: str | bytes):
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def _parquet(**columns: list):
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "in.parquet")
        return folder / "in.parquet"

    return write


def _dangling_link(folder: Path) -> Path:
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    return folder / "gone.txt"


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda folder: folder / "none/*.txt", r"none/\*.txt' matches no file$"),
        (lambda folder: folder, r"matches no file; for the files of a folder write .*/\*\*/\*.txt"),
        (_file("in.csv", "a,b"), r"in.csv: unsupported suffix '.csv'; sources are .txt"),
        (_file("in.txt", ""), "no text in 1 file$"),
        (_file("in.txt", b"\xff\xfe\x00"), "in.txt: is not text"),
        (_file("in.py", "# coding: nonsense\n"), "in.py: is not text .*nonsense"),
        (_dangling_link, "gone.txt: cannot be read"),
        (_file("in.txt", "short"), "too little text for (train|validation)"),
        (_file("in.jsonl", "\n".join([*GOOD_LINES, '{"text": '])), "in.jsonl:61: not a JSON record"),
        (_file("in.jsonl", "[1]\n"), "in.jsonl:1: expected a JSON object, found a list"),
        (_file("in.jsonl", '{"body": "x"}\n'), "in.jsonl:1: has no field 'text' .*only 'body'"),
        (_file("in.jsonl", '\n{"text": 7}\n'), "in.jsonl:2: the text is a number, not a string"),
        (_file("in.jsonl", '{"text": "\\ud800"}\n'), "in.jsonl:1: not valid Unicode"),
        (_file("in.parquet", "PAR1 nonsense"), "in.parquet: "),
        (_parquet(body=["x"]), "in.parquet: has no column 'text' .*only 'body'"),
        (_parquet(text=[1, 2]), "in.parquet: column 'text' holds int64, not text"),
    ],
)
def test_user_errors_are_named_and_leave_nothing_behind(tmp_path, write, named):
    made = recipe(tmp_path, write(tmp_path), shard_tokens=10_000)
    with pytest.raises(DataError, match=named) as caught:
        prepare.run(made)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "runs").rglob("*") if path != made.data_folder.parent]


def test_a_file_in_the_place_of_the_data_folder_is_named(tmp_path):
    made = recipe(tmp_path, _file("in.txt", "words " * 1000)(tmp_path), shard_tokens=10_000)
    made.data_folder.parent.mkdir(parents=True)
    made.data_folder.touch()
    with pytest.raises(DataError, match=r"^run\.folder: /.* cannot be read \(Not a directory\)$"):
        prepare.run(made)


def test_a_damaged_parquet_page_is_named(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": texts(60)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"in\.parquet: "):
        prepare.run(recipe(tmp_path, path))


def test_a_retrieval_document_that_does_not_fit_is_refused_before_reading(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 40 tokens are too few for 4 facts of mqar"):
        prepare.run(recipe(tmp_path, write_corpus(tmp_path / "in", texts(60)), sequence_length=40))
    prepare.run(recipe(tmp_path, tmp_path / "in/*", sequence_length=40, retrieval_tasks={"needle": 1.0}))


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    corpus = write_corpus(tmp_path / "in", texts(60))
    (tmp_path / "runs").write_text("a file")
    message = r"^run\.folder: .*runs/data/stdlib cannot be created, because .*runs is not a folder$"
    with pytest.raises(ConfigError, match=message):
        prepare.run(recipe(tmp_path, corpus))
