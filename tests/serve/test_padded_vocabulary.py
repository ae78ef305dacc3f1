"""An embedding with more rows than the tokenizer has tokens: padding is neither sampled, drafted, offered nor taken."""

import asyncio
from collections.abc import Iterator

import pytest
import torch
from fastapi.testclient import TestClient

from evals.lm import CheckpointLM
from model import checkpoint
from model.transformer import Transformer
from serve.api.asgi import create_app
from serve.engine import Engine, EngineConfig, SamplingParams

TOKENS, ROWS = 38, 48
SETTINGS = [{"temperature": 0}, {"temperature": 2.0}, {"top_k": 3, "presence_penalty": 1.0, "logit_bias": {5: 1.0}}]


@pytest.fixture(scope="module")
def model(random_model_of) -> Transformer:
    """A model that would generate padding only: the rows of padding are large and have either sign."""
    model = random_model_of(ROWS, mtp_layers=1)
    with torch.no_grad():
        rows = model.head.weight[: (ROWS - TOKENS) // 2] * 50
        model.head.weight[TOKENS:] = torch.cat([rows, -rows])
    with torch.inference_mode():
        assert (model(torch.arange(TOKENS)[None]).argmax(-1) >= TOKENS).all()
    return model


@pytest.mark.parametrize("drafts", [0, 2])
def test_padding_is_not_sampled_and_not_an_alternative(model, letters, drafts, monkeypatch) -> None:
    read, tokens_read = model.read, []  # drafts included

    def recorded(input_ids, cache):
        tokens_read.append(int(input_ids.max()))
        return read(input_ids, cache)

    monkeypatch.setattr(model, "read", recorded)
    params = [
        SamplingParams(max_tokens=40, logprobs=5, prompt_logprobs=True, ignore_eos=True, seed=seed, **settings)
        for seed, settings in enumerate(SETTINGS)
    ]

    async def main() -> None:
        engine = Engine(model, letters, EngineConfig(speculative_tokens=drafts))
        stream = engine.submit([([0, 5, 9], one) for one in params])
        records = []
        async for _, delta in stream:
            records += delta.logprobs
        for sequence in stream.sequences:
            assert sequence.completion_tokens == 40
            assert max(sequence.tokens) < TOKENS
            records += sequence.prompt_logprobs[1:]
        assert len(records) == len(params) * (40 + 2)
        assert all(len(record.top) >= 5 and max(token for token, _ in record.top) < TOKENS for record in records)
        stats = engine.stats
        assert stats.drafted_tokens == 0 if not drafts else stats.drafted_tokens > 0
        assert 0 < max(tokens_read) < TOKENS
        await engine.stop()

    asyncio.run(main())


@pytest.fixture(scope="module")
def client(model, letters) -> Iterator[TestClient]:
    with TestClient(create_app(Engine(model, letters), "padded")) as client:
        yield client


@pytest.mark.parametrize(
    ("place", "value"),
    [("prompt.1", [0, TOKENS]), ("stop_token_ids.0", [TOKENS]), (f"logit_bias.{TOKENS}", {str(TOKENS): 1})],
)
def test_padding_is_refused_in_requests(client, place, value) -> None:
    response = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 2, place.partition(".")[0]: value})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        f"{place}: token ID {TOKENS} is out of range for a vocabulary of {TOKENS}"
    )
    assert client.post("/detokenize", json={"tokens": [TOKENS]}).status_code == 400


def test_evaluation_generates_no_padding(model, letters, client, tmp_path) -> None:
    from lm_eval.api.instance import Instance

    checkpoint.save(model, tmp_path, letters)
    lm = CheckpointLM(tmp_path)
    [text] = lm.generate_until([Instance("generate_until", {}, ("the", {"until": [], "max_gen_toks": 12}), 0)])
    body = {"prompt": "the", "max_tokens": 12, "temperature": 0}
    assert text == client.post("/v1/completions", json=body).json()["choices"][0]["text"] != ""
    [(_, greedy)] = lm.loglikelihood([Instance("loglikelihood", {}, ("the", text[:1]), 0)])
    assert greedy == (letters.encode(text[:1]) == letters.encode(text)[:1])
