"""Tokenizers read from ``tokenizer.json`` and the files beside it."""

import json
import sys
import threading

import pytest
from tokenizer_files import added_token, byte_fallback, byte_level, unigram, write_files

from model.errors import ConfigError
from model.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from model.tokenizer.hugging_face import _MIN_BATCH_LENGTH

TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 32},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "</s>",
}
BOS_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


def load(folder, content, **side_files):
    return load_tokenizer(write_files(folder, content, **side_files))


# --- what a file carries


def test_truncation_padding_and_templates_change_no_text(tmp_path):
    content = {**byte_level(), "truncation": TRUNCATION, "padding": PADDING, "post_processor": BOS_TEMPLATE}
    tokenizer = load(tmp_path / "in", content)
    assert tokenizer.encode("a" * 400) == [ord("a") + 2] * 400
    assert tokenizer.encode("abc") == [ord(c) + 2 for c in "abc"]
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)
    assert saved["post_processor"] == BOS_TEMPLATE


def test_a_byte_order_mark_is_skipped(tmp_path):
    for name, content in (("tokenizer", byte_level()), ("tokenizer_config", {"eos_token": "<s>"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert load_tokenizer(tmp_path).eos_token == "<s>"


def test_unused_ids_count_towards_the_size(tmp_path):
    content = byte_level()
    content["model"]["vocab"]["a"] = 600
    tokenizer = load(tmp_path, content)
    assert tokenizer.vocab_size == 601
    assert tokenizer.encode("ab") == [600, ord("b") + 2]
    assert not tokenizer.is_text(300) and tokenizer.decode([300, 600]) == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["added_tokens"].append(added_token("<|x|>", 600)),
            r"'<\|x\|>' has ID 600, but .* reads it as 258",
        ),
        (lambda c: c["added_tokens"].append(added_token("<|x|>", 1)), r"tokens '.*' and '<\|x\|>' share ID 1"),
        (lambda c: c["model"]["vocab"].update(a=1), "tokens '.*' and '.*' share ID 1"),
        (lambda c: c["model"]["vocab"].update(a=2**31), f"token 'a' has ID {2**31}, above"),
        # The library numbers an added token by the size of the vocabulary, which both faults change.
        (
            lambda c: (c["model"]["vocab"].update(a=1), c["added_tokens"].append(added_token("<|x|>", 258))),
            "share ID 1",
        ),
        (
            lambda c: (c["model"]["vocab"].update(a=2 * 10**7), c["added_tokens"].append(added_token("<|x|>", 258))),
            "token 'a' has ID 20000000, above 16777215",
        ),
        (lambda c: (c["model"].update(vocab={}), c.update(added_tokens=[])), "has no tokens"),
    ],
)
def test_ids_that_contradict_each_other_are_refused(tmp_path, change, message):
    content = byte_level()
    change(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, content)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '"x"', "\xff", "[" * 100_000, '{"model": {"vocab": {}}}', '{"model": 3}', '{"a": 0, "b": 1}', "{}"],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: Is a directory"):
        load_tokenizer(tmp_path)


def test_the_byte_tokenizer_is_refused_by_a_smaller_model():
    with pytest.raises(ConfigError, match=r"^byte: has token IDs up to 257, but the model has a vocabulary of 257"):
        load_tokenizer("byte", model_vocab_size=257)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    folder = write_files(tmp_path, byte_level(added=["<|x|>"]))
    assert load_tokenizer(folder, model_vocab_size=259).vocab_size == 259
    with pytest.raises(ConfigError, match="has token IDs up to 258, but the model has a vocabulary of 258"):
        load_tokenizer(folder, model_vocab_size=258)


def test_a_byte_vocabulary_with_further_tokens_keeps_them(tmp_path):
    ByteTokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    content["added_tokens"].append(added_token("<|im_end|>", 258))
    assert load(tmp_path, content).special_tokens["<|im_end|>"] == 258


# --- text is text


@pytest.mark.parametrize("content", [byte_level(), byte_fallback("abc"), unigram("abcs</>")], ids=["b", "f", "u"])
def test_spellings_of_special_tokens_are_text(tmp_path, content):
    tokenizer = load(tmp_path, content)
    text = "abc</s>ab<s>c"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_spellings_are_text_in_a_vocabulary_of_words(tmp_path):
    content = json.loads(json.dumps(unigram("ab")))
    content["model"] = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "?": 2, "a": 3}, "unk_token": "?"}
    content["added_tokens"] = [added_token("<s>", 0), added_token("</s>", 1)]
    content["pre_tokenizer"], content["decoder"] = {"type": "WhitespaceSplit"}, None
    tokenizer = load(tmp_path, content)
    assert tokenizer.encode("a </s> a") == [3, 2, 2, 2, 2, 3]
    del content["model"]["vocab"]["?"]
    with pytest.raises(ConfigError, match="has no ordinary tokens for the text '</s>'"):
        load(tmp_path, content).encode("a </s> a")


def test_special_tokens_are_parsed_on_request(tmp_path):
    tokenizer = load(tmp_path, byte_level(added=["<|im_end|>"]))
    a = ord("a") + 2
    assert tokenizer.encode("a<|im_end|>a", parse_special=True) == [a, 258, a]
    assert 258 not in tokenizer.encode("a<|im_end|>a")
    assert tokenizer.encode_prompt("<s>a", parse_special=True) == [0, a]
    assert tokenizer.encode_prompt("a", parse_special=True) == [0, a]
    assert tokenizer.encode_prompt("<s>a")[:2] == [0, ord("<") + 2]


def test_text_that_is_normalized_to_a_spelling_is_text(tmp_path):
    content = {**byte_level(added=["<|x|>"]), "normalizer": {"type": "Lowercase"}}
    content["added_tokens"][-1]["normalized"] = True
    tokenizer = load(tmp_path, content)
    special = tokenizer.special_tokens["<|x|>"]
    assert tokenizer.encode("<|x|>a", parse_special=True)[0] == special
    for parse_special in (False, True):
        assert tokenizer.encode("<|X|>", parse_special) == tokenizer.encode("<|x|>")
        assert special not in tokenizer.encode("<|X|>", parse_special)


@pytest.mark.parametrize("content", [byte_level(), byte_fallback("abc"), unigram("abcé ")], ids=["b", "f", "u"])
def test_long_text_is_encoded_and_decoded_like_short_text(tmp_path, monkeypatch, content):
    tokenizer, text = load(tmp_path, content), " ab <s>é  cab" * 9
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode([0, 2 + 0xE2, *ids, 1])
    monkeypatch.setattr("model.tokenizer.hugging_face._MIN_BATCH_LENGTH", 0)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode([0, 2 + 0xE2, *ids, 1]) == decoded


@pytest.mark.parametrize("operation", ["encode", "decode"])
def test_other_threads_run_during_the_processing_of_long_text(tmp_path, operation):
    tokenizer = load(tmp_path, byte_level())
    content = {"encode": "ab" * _MIN_BATCH_LENGTH, "decode": [5] * _MIN_BATCH_LENGTH}[operation]
    begin, began = threading.Event(), []

    def wait():
        begin.wait()
        began.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)  # no thread has to release the interpreter
    try:
        begin.set()
        for _ in range(100):
            getattr(tokenizer, operation)(content)
            if began:
                break
        found = bool(began)
    finally:
        sys.setswitchinterval(interval)
        begin.set()
        thread.join()
    assert found


def test_text_without_tokens_is_refused(tmp_path):
    tokenizer = load(tmp_path, unigram("ab", unknown=False))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot encode 'c'"):
        tokenizer.encode("abc")


def test_text_inside_a_longer_one_has_no_space_in_front(tmp_path):
    for name, content in (("u", unigram("ab")), ("f", byte_fallback("ab"))):
        tokenizer = load(tmp_path / name, content)
        assert len(tokenizer.encode("ab")) == 3
        assert tokenizer.encode_inside("ab") == tokenizer.encode("ab")[1:]
    merging = load(tmp_path / "b", byte_level(merges=[("a", "a"), ("a", "b")]))
    for text in ("ab", " b", "\nb", "aab"):
        assert merging.encode_inside(text) == merging.encode(text)


def test_invalid_bytes_leave_valid_neighbors_intact(tmp_path):
    tokenizer = load(tmp_path, byte_fallback("ab"))
    euro = [byte + 2 for byte in "€".encode()]
    assert tokenizer.decode([*euro, *euro]) == "€€"
    assert tokenizer.decode([*euro, *euro[:2]]) == "€\ufffd"
    assert tokenizer.decode([*euro[:1], *tokenizer.encode_inside("a€")]) == "\ufffda€"


# --- special tokens

NAMES = ("<|start|>", "<|return|>")


def test_declared_tokens_are_read_by_precedence(tmp_path):
    content = byte_level(names=NAMES, added=["<|call|>", "<pad>"])
    assert load(tmp_path / "0", content, tokenizer_config={"eos_token": "<|return|>"}).eos_id == 1
    assert load(tmp_path / "1", content, tokenizer_config={"eos_token": {"content": "<|return|>"}}).eos_id == 1
    assert load(tmp_path / "2", content, special_tokens_map={"eos_token": ["<|call|>"]}).eos_id == 258
    assert load(tmp_path / "3", content, generation_config={"eos_token_id": [258, 1]}).eos_id == 258
    assert load(tmp_path / "4", content, config={"eos_token_id": 1}).eos_id == 1
    every = {
        "tokenizer_config": {"eos_token": "<|return|>", "bos_token": None},
        "special_tokens_map": {"eos_token": "<|call|>", "bos_token": "<|start|>"},
        "generation_config": {"eos_token_id": [30, 258]},
        "config": {"eos_token_id": 40, "bos_token_id": 5},
    }
    tokenizer = load(tmp_path / "5", content, **every)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.stop_ids == {1, 30, 258}
    chosen = load_tokenizer(tmp_path / "5", bos_token="<pad>", eos_token="<|call|>")
    assert (chosen.bos_id, chosen.eos_id, chosen.eos_token) == (259, 258, "<|call|>")


def test_a_vocabulary_without_declared_or_usual_tokens_is_refused(tmp_path):
    folder = write_files(tmp_path, byte_level(names=NAMES))
    with pytest.raises(ConfigError, match=r"^eos_token: must be given, because no end-of-sequence token is declared"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, eos_token="<|return|>").bos_id == 1  # one token for both
    with pytest.raises(ConfigError, match=r"^eos_token: '<eot>' is not a token of .*tokenizer\.json"):
        load_tokenizer(folder, eos_token="<eot>")
    write_files(tmp_path, byte_level(), tokenizer_config={"eos_token": "<eot>"})
    with pytest.raises(ConfigError, match=r"^eos_token: must be given, .* declare '<eot>', which is not a token of it"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match="bos_token: '<s>' is not a token of the byte tokenizer"):
        load_tokenizer("byte", bos_token="<s>")


@pytest.mark.parametrize(
    ("side_files", "message"),
    [
        ({"tokenizer_config": []}, "tokenizer_config.json: expected a JSON object, found a list"),
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token: expected a token"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {}}}},
            'token IDs as keys, found "x"',
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}},
            "added_tokens_decoder: expected token IDs as",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"1": {}}}},
            r'decoder\["1"\].content: expected a string, found null',
        ),
        ({"generation_config": {"eos_token_id": "1"}}, 'eos_token_id of generation_config.json .*, found "1"'),
        (
            {"config": {"eos_token_id": [1, True]}},
            r"eos_token_id of .* config.json: expected a token ID or a list .*, found true",
        ),
    ],
)
def test_malformed_declarations_are_named(tmp_path, side_files, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, byte_level(), **side_files)


def test_declared_tokens_are_special_even_if_not_marked(tmp_path):
    content = byte_level()
    content["added_tokens"] = [added_token("<s>", 0), added_token("</s>", 1, special=False)]
    for folder, listed in (("listed", content["added_tokens"]), ("unlisted", content["added_tokens"][:1])):
        tokenizer = load(tmp_path / folder, {**content, "added_tokens": listed})
        assert 1 not in tokenizer.encode("a</s>")
        assert tokenizer.decode([ord("a") + 2, 1]) == "a"


def test_tokens_listed_only_in_tokenizer_config_are_added(tmp_path):
    decoder = {"258": {"content": "<|im_end|>", "special": True}, "0": {"content": "<s>", "special": True}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "extra_special_tokens": {"image": "<pic>"}}
    tokenizer = load(tmp_path, byte_level(), tokenizer_config=config)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (258, 259)


# --- saving


def test_saved_folders_keep_tokens_templates_and_settings(tmp_path):
    content = byte_level(names=NAMES, added=["<|call|>", "<pad>"])
    config = {"eos_token": {"content": "<|return|>"}, "pad_token": "<pad>", "chat_template": "{{ messages }}", "n": 1}
    folder = write_files(
        tmp_path / "in",
        content,
        tokenizer_config=config,
        generation_config={"top_p": 0.9},
        config={"eos_token_id": 258},
    )
    (folder / "additional_chat_templates").mkdir()
    templates = {"chat_template.jinja": "a\r\né", "additional_chat_templates/tools.jinja": "b"}
    for name, text in templates.items():
        (folder / name).write_bytes(text.encode())
    (tmp_path / "out").mkdir()
    load_tokenizer(folder, bos_token="<pad>").save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert (again.bos_id, again.eos_id, again.stop_ids) == (259, 1, {1, 258})
    assert again.tokenizer_config() == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **config,
        "bos_token": "<pad>",
    }
    assert again.generation_config() == {"top_p": 0.9, "bos_token_id": 259, "eos_token_id": [1, 258]}
    for name, text in templates.items():
        assert (tmp_path / "out" / name).read_bytes() == text.encode()


@pytest.mark.parametrize(
    ("declared", "chosen", "stops"),
    [(["<|return|>", "<|call|>"], None, {1, 258}), ("<|return|>", "<|call|>", {1, 258})],
)
def test_saved_folders_keep_every_token_that_ends_generation(tmp_path, declared, chosen, stops):
    content = byte_level(names=NAMES, added=["<|call|>"])
    folder = write_files(tmp_path / "in", content, tokenizer_config={"eos_token": declared})
    tokenizer = load_tokenizer(folder, eos_token=chosen)
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert tokenizer.stop_ids == again.stop_ids == stops
    assert again.eos_id == tokenizer.eos_id
    assert again.generation_config()["eos_token_id"] == [again.eos_id, *(stops - {again.eos_id})]


def test_stop_ids_outside_the_vocabulary_are_ignored(tmp_path):
    folder = write_files(tmp_path, byte_level(names=NAMES), generation_config={"eos_token_id": [1, 258]})
    assert load_tokenizer(folder).stop_ids == {1}


def test_the_byte_tokenizer_keeps_the_files_beside_it(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 30]}')
    (tmp_path / "chat_template.jinja").write_text("x")
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.stop_ids == {1, 30}
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").side_files.templates == {"chat_template.jinja": "x"}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<｜begin▁of▁sentence｜>"}')
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)
