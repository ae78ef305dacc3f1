"""Tokenizer files of a wrong structure: one sentence names the file and the key."""

import copy
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import added_token, byte_fallback, byte_level, unigram, write_files

from model.errors import ConfigError
from model.tokenizer import load_tokenizer

FILES = {
    "byte level": byte_level([("a", "b")], added=["<|x|>"]),
    "byte fallback": byte_fallback("abc"),
    "unigram": unigram("abc"),
}
SIDE_FILES = {
    "tokenizer_config": {
        "eos_token": "</s>",
        "added_tokens_decoder": {"600": {"content": "<|y|>", "special": True}},
        "chat_template": "{{ messages }}",
    },
    "generation_config": {"eos_token_id": [1]},
}


def changed(content, change):
    content = copy.deepcopy(content)
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(added_tokens=5), r"added_tokens: expected a list, found 5"),
        (lambda c: c["added_tokens"].append(5), r"added_tokens\[3\]: expected an object, found 5"),
        (
            lambda c: c["added_tokens"][2].update(content=["x"]),
            r"added_tokens\[2\]\.content: expected a string, found \[.x.\]",
        ),
        (lambda c: c["added_tokens"][2].pop("id"), r"added_tokens\[2\]\.id: expected a token ID, found null"),
        (lambda c: c["added_tokens"][2].update(id="600"), r"added_tokens\[2\]\.id: expected a token ID, found .600."),
        (lambda c: c["added_tokens"][2].update(id=-1), r"added_tokens\[2\]\.id: expected a token ID, found -1"),
        (lambda c: c["added_tokens"][2].update(id=True), r"added_tokens\[2\]\.id: expected a token ID, found true"),
        (lambda c: c["model"].update(vocab=5), r"model\.vocab: expected an object or a list, found 5"),
        (lambda c: c["model"].update(vocab=[5, 6]), r"model\.vocab\[0\]: expected a token and its score, found 5"),
        (lambda c: c["model"]["vocab"].update(a="x"), r"model\.vocab\[.a.\]: expected a token ID, found .x."),
        (lambda c: c.update(model=[]), r"model: expected an object, found \[\]"),
    ],
)
@pytest.mark.parametrize("side_files", [{}, SIDE_FILES], ids=["alone", "with added tokens"])
def test_a_wrong_structure_is_named_with_file_and_key(tmp_path, change, message, side_files):
    folder = write_files(tmp_path, changed(FILES["byte level"], change), **side_files)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/tokenizer\.json: {message}"):
        load_tokenizer(folder)


def test_bpe_dropout_is_switched_off(tmp_path):
    content = byte_level([("a", "b"), ("ab", "ab")])
    content["model"]["dropout"] = 0.5
    tokenizer = load_tokenizer(write_files(tmp_path / "in", content))
    assert {len(tokenizer.encode("abab" * 50)) for _ in range(5)} == {50}
    assert {len(tokenizer.encode("abab" * 50, parse_special=True)) for _ in range(5)} == {50}
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["dropout"] is None


# --- any change of a valid file

SCALARS = [None, True, 0, 1, -1, 5, 600, 2**31, 2**70, 0.5, "", "x", "600", "BPE", "\ud800"]
LISTS = [[], [5], ["x"], [["a", 0.0]], [added_token("new", 600)]]
MAPPINGS = [{}, {"type": "BPE"}, {"content": ["x"]}, {"Fixed": 2}, added_token("<s>", 3)]
ODD = st.sampled_from([*SCALARS, *LISTS, *MAPPINGS])


def places(value, path=()):
    """Return the paths of all values in a JSON value, but of few tokens of a vocabulary."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in [*keys[:4], *keys[-4:]] if len(keys) > 30 else keys:
            found += places(value[key], (*path, key))
    return found


def mutate(content, draw_index, draw_value):
    """Remove, replace or repeat a value."""
    where = places(content)
    *parents, last = where[draw_index % len(where)]
    target = content
    for key in parents:
        target = target[key]
    kind = draw_index % 5
    if kind == 0:
        del target[last]
    elif kind == 1 and isinstance(target, list):
        target.append(copy.deepcopy(target[last]))
    elif kind == 1:
        target["copy"] = copy.deepcopy(target[last])
    else:
        target[last] = copy.deepcopy(draw_value)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(FILES)),
    st.booleans(),
    st.lists(st.tuples(st.booleans(), st.integers(0, 10_000), ODD), min_size=1, max_size=3),
)
def test_any_mutation_of_a_tokenizer_is_read_or_refused_in_one_sentence(tmp_path, name, beside, mutations):
    files = copy.deepcopy({"tokenizer": FILES[name], **(SIDE_FILES if beside else {})})
    for in_tokenizer, index, value in mutations:
        target = files["tokenizer"] if in_tokenizer or not beside else {**files, "tokenizer": {}}
        if places(target):
            mutate(target, index, value)
    for old in tmp_path.glob("*.json"):
        old.unlink()
    try:
        tokenizer = load_tokenizer(write_files(tmp_path, files.pop("tokenizer"), **files))
        ids = tokenizer.encode("ab </s><s>é")
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.decode(random.Random(0).choices(range(tokenizer.vocab_size), k=5))
        tokenizer.encode_inside("ab<|x|>", parse_special=True)
    except ConfigError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
