"""The deployed endpoint, from Ray Serve to the openai client."""

import gzip
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import torch
from deployments import recipe_for
from fastapi.testclient import TestClient
from listening_sockets import listeners, process_tree
from ray import serve as ray_serve
from ray.exceptions import RayActorError

from model import checkpoint
from model.cache import Cache
from model.errors import CheckpointError, ConfigError, FiftyfoldError
from model.generation import prefill
from model.transformer import Transformer
from pipelines.ray_runtime.cluster_token import VARIABLE
from pipelines.steps import deploy
from pipelines.steps.deploy import Deployment, start
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.served_models import ModelStore
from serve.app import Gateway, ModelServer, build_gateway, build_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, long_model, letters) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "letters" / "final"
    checkpoint.save(long_model, folder, letters)
    return folder


@pytest.fixture(scope="module")
def deployment(ray_cluster, saved) -> Iterator[Deployment]:
    limits = {
        "max_active_requests": 2,
        "max_waiting_requests": 1,
        "max_body_bytes": 20_000,
        "prefill_chunk": 32,
        "keep_alive_seconds": 60,  # a busy machine must not add comments
        "stream_interval_seconds": 0,
        "allowed_origins": ["http://localhost:3000"],
    }
    with start(recipe_for(saved.parents[1], saved, **limits)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until_idle(deployment: Deployment, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while (unfinished := httpx.get(f"{deployment.url}/healthz").json()["unfinished"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert unfinished == 0


def test_deployed_model_card(deployment, client) -> None:
    [card] = client.models.list().data
    assert card.id == deployment.model_name == "letters/final"
    assert card.cache_bytes_per_token > 0
    assert deployment.weights == "float32"
    assert client.models.retrieve(card.id) == card


def test_a_deployment_listens_on_loopback_only(deployment) -> None:
    assert [each for each in listeners(process_tree()) if not each.is_loopback] == []


def test_replicas_refuse_calls_without_the_token_of_the_cluster(deployment) -> None:
    answers = []
    for each in listeners(process_tree()):
        if not each.process.startswith("ray::ServeReplica:"):
            continue
        with grpc.insecure_channel(f"127.0.0.1:{each.port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as without_token:
                call(b"")
            with pytest.raises(grpc.RpcError) as with_token:
                call(b"", metadata=[("authorization", f"Bearer {os.environ[VARIABLE]}")])
        answers.append((without_token.value.code(), with_token.value.code()))
    code = grpc.StatusCode
    # With the token, an empty call reaches the replica and fails there. Ray's own servers have no such method.
    assert [before for before, after in answers if after is code.UNKNOWN] == [code.UNAUTHENTICATED] * 2, answers


def test_greedy_completion_equals_the_model(deployment, client, endless_model, letters) -> None:
    prompt = [letters.bos_id, *letters.encode("the other rain")]
    with torch.inference_mode():
        cache = Cache(endless_model.config, 1, 100)
        token = prefill(endless_model, cache, torch.tensor([prompt]), chunk=32).argmax(-1)
        want = [int(token)]
        for _ in range(19):
            token = endless_model(token[None], cache)[:, -1].argmax(-1)
            want.append(int(token))
    answer = client.completions.create(
        model=deployment.model_name, prompt="the other rain", max_tokens=20, temperature=0
    )
    assert answer.choices[0].text == letters.decode(want)
    assert answer.usage.completion_tokens == 20
    assert answer.fiftyfold["cache_nbytes"] == Cache(endless_model.config, 1, len(prompt) + 19).nbytes()


def test_chat_and_reports_behind_the_proxy(deployment, client) -> None:
    ask = dict(model=deployment.model_name, messages=[{"role": "user", "content": "the rain"}], max_tokens=20, seed=5)
    whole = client.chat.completions.create(**ask)
    chunks = client.chat.completions.create(**ask, stream=True)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert 'fiftyfold_completions_total{outcome="length"}' in httpx.get(f"{deployment.url}/metrics").text
    assert httpx.get(f"{deployment.url}/v1/cache").json()["pages"]["tokens"] == 64
    assert httpx.get(f"{deployment.url}/").headers["content-type"] == "text/html; charset=utf-8"


def test_stream_is_incremental_and_equals_the_response(deployment, client) -> None:
    ask = dict(model=deployment.model_name, prompt="the other rain", max_tokens=400, seed=5, temperature=1)
    whole = client.completions.create(**ask)
    times, texts, asked = [], [], time.monotonic()
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        times.append(time.monotonic())
        texts += [choice.text for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert chunk.usage == whole.usage
    assert len(texts) > 30
    # If the server buffered the text, all chunks would arrive at the end.
    assert times[-1] - times[0] > (times[-1] - asked) / 2


def test_concurrent_clients_get_the_same_text_as_sequential_ones(deployment, client) -> None:
    def ask(seed: int) -> str:
        return (
            client.completions.create(model=deployment.model_name, prompt="in", max_tokens=20, seed=seed)
            .choices[0]
            .text
        )

    alone = {seed: ask(seed) for seed in range(3)}
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=seed: together.update({s: ask(s)})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "is not served here"),
        ({"prompt": [5] * 5000}, openai.BadRequestError, "the model's context of 4096"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"logit_bias": {"99": 2}}, openai.BadRequestError, "out of range"),
        ({"n": 9}, openai.BadRequestError, "the server accepts at most 3"),
        ({"prompt": "a" * 30_000}, openai.APIStatusError, "larger than the limit of 20000 bytes"),
    ],
)
def test_errors_reach_the_client(deployment, client, change, error, words) -> None:
    with pytest.raises(error, match=words):
        client.completions.create(**{"model": deployment.model_name, "prompt": "a", **change})


LONG = {"prompt": "the", "max_tokens": 4000, "temperature": 0}


def generated_tokens(deployment: Deployment) -> float:
    metrics = httpx.get(f"{deployment.url}/metrics").text
    [line] = (line for line in metrics.splitlines() if line.startswith("fiftyfold_generated_tokens_total "))
    return float(line.split()[1])


@pytest.mark.parametrize("streamed", [True, False])
def test_a_disconnect_frees_capacity(deployment, streamed) -> None:
    body, before = LONG | {"stream": streamed}, generated_tokens(deployment)
    if streamed:
        with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=httpx.Timeout(120, read=0.2))
    wait_until_idle(deployment)
    assert generated_tokens(deployment) - before < LONG["max_tokens"]  # without an abort, it would decode to the end


def test_a_full_queue_answers_429(deployment, client) -> None:
    body = LONG | {"n": 3, "stream": True}
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # keep a reference: the connection closes with the iterator
        next(lines)
        with pytest.raises(openai.RateLimitError, match="busy with 3 of at most 3"):
            client.completions.create(model=deployment.model_name, prompt="a")
    wait_until_idle(deployment)


def test_http_conventions_hold_behind_the_proxy(deployment) -> None:
    with httpx.Client(base_url=deployment.url) as client:
        listing = client.get("/v1/models/")
        assert listing.json()["object"] == "list"
        head = client.head("/v1/models")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(listing.content))
        wrong = client.put("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "OPTIONS, POST")
        assert client.options("/healthz").headers["allow"] == "GET, HEAD, OPTIONS"
        page = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
        allowed = client.options("/v1/completions", headers=page).headers["access-control-allow-origin"]
        assert allowed == "http://localhost:3000"
        body = {"prompt": "a", "max_tokens": 2, "min_p": 0, "n": None}
        compressed = gzip.compress(json.dumps(body).encode())
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        assert client.post("/v1/completions/", content=compressed, headers=headers).status_code == 200
        assert client.post("/v1/completions", content=b'{"model": "\\ud800"}').status_code == 400


def test_a_port_in_use_is_refused_before_start(ray_cluster, saved) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^serve.port: cannot listen on 127.0.0.1:{port} \(Address already in use\)$"
        ):
            start(recipe_for(saved.parents[1], saved, port=port))


@pytest.mark.parametrize("error", [RuntimeError("no"), RayActorError(), TimeoutError("not available after 60s")])
def test_a_proxy_that_fails_to_start_is_reported(saved, monkeypatch, error) -> None:
    def fail(**_) -> None:
        raise error

    monkeypatch.setattr(deploy, "ray_session", lambda **_: nullcontext())
    monkeypatch.setattr(deploy, "check_serve_cluster", lambda section: None)
    monkeypatch.setattr(ray_serve, "start", fail)
    monkeypatch.setattr(ray_serve, "shutdown", lambda: None)
    with pytest.raises(FiftyfoldError, match=r"^serve: Ray Serve could not start \(.+\)$"):
        start(recipe_for(saved.parents[1], saved))


def test_a_second_deployment_does_not_replace_the_first(deployment, saved) -> None:
    with pytest.raises(ConfigError, match="already runs Ray Serve"):
        start(recipe_for(saved.parents[1], saved))
    assert httpx.get(f"{deployment.url}/healthz").status_code == 200


def test_lm_eval_scores_through_the_endpoint(deployment, endless_model, letters) -> None:
    """lm-eval's unmodified client gets the model's log-likelihoods."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=f"{deployment.url}/v1/completions", model=deployment.model_name, max_length=4096, num_concurrent=2
    )
    pairs = [("the other", " rain"), ("in", "the end"), ("on and on", " at")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (logprob, greedy) in zip(pairs, lm.loglikelihood(requests)):
        before, after = letters.encode(context), letters.encode(continuation)
        with torch.inference_mode():
            want = endless_model(torch.tensor([before + after]))[0].log_softmax(-1)[len(before) - 1 : -1]
        token_logprobs = want.gather(1, torch.tensor(after)[:, None])
        assert logprob == pytest.approx(token_logprobs.sum().item(), abs=1e-2)
        assert greedy == (want.argmax(-1).tolist() == after)
    [text] = lm.generate_until([Instance("generate_until", {}, ("the", {"until": ["a"], "max_gen_toks": 8}), 0)])
    assert "a" not in text


def test_a_registered_model_is_found_by_alias(tmp_path, saved) -> None:
    recipe = recipe_for(tmp_path, "models:/letters@champion")
    client = open_tracking(recipe).client
    client.create_registered_model("letters")
    version = client.create_model_version("letters", saved.as_uri())
    client.set_registered_model_alias("letters", "champion", version.version)
    [model] = ModelStore(recipe).find()
    assert (model.name, model.version) == ("letters", "1")
    assert checkpoint.load_config(model.checkpoint) == checkpoint.load_config(saved)
    with pytest.raises(ConfigError, match=r"^serve\.model_uri: cannot get models:/letters@other"):
        ModelStore(recipe_for(tmp_path, "models:/letters@other")).find()


def test_replicas_that_do_not_fit_the_cluster_are_refused(ray_cluster, saved) -> None:
    # Ray Serve would wait forever for the missing CPUs.
    with pytest.raises(ConfigError, match=r"50 replicas of 0\.5 CPU would use 25 CPUs, the Ray cluster has \d+$"):
        start(recipe_for(saved.parents[1], saved, replicas=50))


def test_a_gateway_serves_only_with_its_key(monkeypatch) -> None:
    gateway_class = Gateway.func_or_class.__mro__[1]  # Ray Serve's own initializer is a coroutine
    gateway = gateway_class({"models": ["letters"], "api_key_variable": "SOME_KEY"})
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="api_key_variable: SOME_KEY: not set in the environment of this process"):
        gateway.__serve_build_asgi_app__()
    monkeypatch.setenv("SOME_KEY", "correct-horse")
    with TestClient(gateway.__serve_build_asgi_app__()) as client:
        for path in ("/v1/models", "/v1/cache", "/metrics", "/v1/completions", "/none"):
            assert client.get(path).status_code == 401
        headers = {"Authorization": "Bearer correct-horse"}
        assert client.get("/v1/cache?model=other", headers=headers).status_code == 404


def test_build_names_invalid_args() -> None:
    with pytest.raises(ConfigError, match=r"^serve args: api_key_variable: .*set api_key_file or api_key_variable"):
        build_gateway({"models": ["x"], "api_key_file": "a", "api_key_variable": "b"})
    with pytest.raises(ConfigError, match="serve args: models: must not be empty"):
        build_gateway({"models": []})
    with pytest.raises(ConfigError, match="serve args: prefil_chunk: unknown key"):
        build_model({"checkpoint": "x", "model_name": "x", "prefil_chunk": 5})
    with pytest.raises(ConfigError, match="serve args: checkpoint: missing"):
        build_model({"model_name": "x"})
    with pytest.raises(ConfigError, match=r"serve args: .*max_replicas: must be at least replicas \(2\), found 1"):
        build_model({"checkpoint": "x", "model_name": "x", "replicas": 2, "max_replicas": 1})


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_deployment(tmp_path, saved, number) -> None:
    recipe = recipe_for(tmp_path, saved)
    code = (
        "import json, sys; from pipelines.recipe.loading import recipe_from_dict; "
        "from pipelines.steps.deploy import run; run(recipe_from_dict(json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, json.dumps(recipe.to_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines: list[str] = []
        try:
            while not lines or not lines[-1].startswith("  curl"):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            curl = shlex.split(lines[-1])
            answer = json.loads(subprocess.run([*curl, "-s"], capture_output=True, check=True, text=True).stdout)
            assert answer["object"] == "text_completion"
            process.send_signal(number)
            rest = process.stdout.read()
            assert process.wait(60) == 0, rest
        finally:
            process.kill()
    assert f"serving {saved} as 'letters/final' at http://127.0.0.1:{recipe.serve.port}/v1" in lines[-3]
    assert [line.split(";")[0] for line in rest.splitlines()] == ["stopping"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", recipe.serve.port)) != 0


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_weights_use_the_faster_data_type(saved, monkeypatch, fast, dtype) -> None:
    stored = []
    monkeypatch.setattr(Transformer, "cast_weights", lambda model, dtype: stored.append(dtype))
    monkeypatch.setattr("serve.engine.config.multiplies_bf16_fast", lambda device: fast)
    server = ModelServer.func_or_class({"checkpoint": str(saved), "model_name": "letters"})
    assert stored == [getattr(torch, dtype)]
    assert server.engine.config.weights == dtype


def test_missing_and_damaged_models(tmp_path, saved, endless_model, letters) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint folder"):
        start(recipe_for(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"mlflow\.db: no such tracking store; run the train step first"):
        start(recipe_for(tmp_path, "models:/fiftyfold@champion"))
    checkpoint.save(endless_model, tmp_path / "no-tokenizer")
    with pytest.raises(ConfigError, match=r"no-tokenizer/tokenizer\.json: No such file"):
        start(recipe_for(tmp_path, tmp_path / "no-tokenizer"))
    checkpoint.save(endless_model, tmp_path / "damaged", letters)
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"damaged.*model.safetensors"):
        start(recipe_for(tmp_path, tmp_path / "damaged"))


def test_event_stream_bytes(deployment) -> None:
    """The raw event stream, as a client without a library reads it."""
    body = {"prompt": "the", "max_tokens": 3, "temperature": 0, "stream": True}
    text = httpx.post(f"{deployment.url}/v1/completions", json=body).text
    lines = text.split("\n")
    assert lines[-3:] == ["data: [DONE]", "", ""]
    for data, blank in zip(lines[:-3:2], lines[1:-3:2]):
        assert blank == ""
        assert json.loads(data.removeprefix("data: "))["object"] == "text_completion"
