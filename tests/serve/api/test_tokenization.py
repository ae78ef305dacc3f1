"""Tokenizer routes."""

import pytest

TEXT = "the other rain "


def test_tokenizer_routes(client, letters) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (letters.bos_token, letters.eos_token)
    for name, token in (("bos_token", letters.bos_id), ("eos_token", letters.eos_id)):
        body = {"prompt": info[name], "add_special_tokens": False}
        assert client.post("/tokenize", json=body).json()["tokens"] == [token]
    tokens = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert tokens == [letters.bos_id, *letters.encode(TEXT)]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": TEXT}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("a", 'tokens: expected a list of token IDs, found "a"'),
        ([5, "a"], 'tokens.1: expected a token ID, found "a"'),
        ([[5]], "tokens.0: expected a token ID, found a list"),
    ],
)
def test_other_values_than_token_ids_are_quoted(client, tokens, message) -> None:
    response = client.post("/detokenize", json={"tokens": tokens})
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)


def test_the_event_loop_is_free_for_streams(client, letters, lengths_on_event_loop) -> None:
    text = "the rain in " * 40
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    assert lengths_on_event_loop == []
