"""lm-eval's clients of completion servers give the scores of the checkpoint evaluated in this process."""

from collections.abc import Iterator

import pytest
from listening_server import Listening, listening
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from evals.lm import CheckpointLM
from model import checkpoint
from serve.api.chat_template import ChatTemplate
from serve.engine import Engine, EngineConfig

WORDS = ["in", "the", "other", "rain", "at", "an", "hen", "é"]
CONTEXTS = [" ".join(WORDS[(i * j) % 8] for j in range(1, i % 5 + 3)) for i in range(110)]


@pytest.fixture(scope="module")
def server(byte_model, byte_tokenizer) -> Iterator[Listening]:
    with listening(Engine(byte_model, byte_tokenizer, EngineConfig(weights="float32"))) as server:
        yield server


@pytest.fixture(scope="module")
def local(byte_model, byte_tokenizer, tmp_path_factory) -> CheckpointLM:
    folder = tmp_path_factory.mktemp("checkpoint") / "bytes"
    checkpoint.save(byte_model, folder, byte_tokenizer)
    return CheckpointLM(folder)


class WithoutBos(CheckpointLM):
    """Without BOS in front of contexts, as lm-eval's client sends the tokens of a remote tokenizer."""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return super().tok_encode(string, add_special_tokens=False)


def completions(server: Listening, **options) -> LocalCompletionsAPI:
    # Without retries, a single refusal would end the evaluation.
    settings = {"model": "letters", "max_length": 512, "max_retries": 1, **options}
    return LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", **settings)


def test_log_likelihoods_of_a_hundred_concurrent_requests(server, local) -> None:
    pairs = [(context, f" {WORDS[i % 8]}") for i, context in enumerate(CONTEXTS)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = completions(server, num_concurrent=100).loglikelihood(requests)
    want = WithoutBos(local.checkpoint).loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in want], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def test_rolling_log_likelihoods(server, local, byte_tokenizer) -> None:
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(CONTEXTS[:10])]
    found = completions(server, num_concurrent=4, custom_prefix_token_id=byte_tokenizer.bos_id).loglikelihood_rolling(
        requests
    )
    assert found == pytest.approx(local.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3)


def generation(context: object, i: int) -> Instance:
    return Instance(
        "generate_until", {}, (context, {"until": ["qq", "\n\n"], "max_gen_toks": 12, "do_sample": False}), i
    )


def test_generations_of_completions(server, local) -> None:
    requests = [generation(context, i) for i, context in enumerate(CONTEXTS)]
    # As text, to which the server adds BOS.
    lm = completions(server, num_concurrent=100, tokenized_requests=False)
    found = lm.generate_until(requests, disable_tqdm=True)
    assert found == local.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 10


def test_generations_of_chat_completions(server, local, byte_tokenizer) -> None:
    lm = LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions", model="letters", num_concurrent=100, max_retries=1
    )
    chats = [[{"role": "user", "content": context}] for context in CONTEXTS]
    asked = [generation(lm.apply_chat_template(chat), i) for i, chat in enumerate(chats)]
    found = lm.generate_until(asked, disable_tqdm=True)
    template = ChatTemplate(byte_tokenizer)
    rendered = [byte_tokenizer.decode(template.encode(chat, [], True, {})[1:]) for chat in chats]  # without BOS
    want = local.generate_until([generation(text, i) for i, text in enumerate(rendered)], disable_tqdm=True)
    assert found == want
    assert len(set(found)) > 10
