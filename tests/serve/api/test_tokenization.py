"""Tokenizer routes."""

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
