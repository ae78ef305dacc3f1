"""The whole loop in one command: ``make demo``, or ``python -m pipelines demo --config configs/tiny.yaml``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from evals.tasks.generators import retrieval_questions
from model import checkpoint
from model.costs import cache_bytes_per_token
from model.errors import FiftyfoldError
from model.tokenizer import load_tokenizer
from pipelines.experiments.outputs import command_of
from pipelines.experiments.scoring import check_section
from pipelines.ray_runtime.session import local_cpus, ray_session
from pipelines.recipe.loading import overlay, with_overrides
from pipelines.recipe.messages import naming
from pipelines.recipe.metrics import RECALL
from pipelines.recipe.quoting import first_line
from pipelines.recipe.schema import Recipe
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN, measured_cache
from pipelines.reports.statistics import tokens_to
from pipelines.reports.terminal import print_table
from pipelines.steps import Step, deploy, evaluate, prepare, promote, sweep, train
from pipelines.tracking.mlflow_store import attach, open_tracking, ui_command
from pipelines.training.curriculum import curriculum, tokens_after

TARGET_RECALL = 0.9


@dataclass(frozen=True)
class Contestant:
    """One model's column of the final table."""

    name: str
    recipe: Recipe
    metrics: dict[str, float]
    muon_share: float
    seconds: float
    recall_tokens: float | None = None
    """Training tokens after which the held-out recall first reached :data:`TARGET_RECALL`; infinite if it did not."""


def run(recipe: Recipe) -> None:
    """Prepare, train, sweep, evaluate, promote, deploy and ask; print a table of hybrid against baseline.

    Raises FiftyfoldError if the champion's recall is below ``demo.least_recall``.
    """
    with naming("demo.baseline"):
        baseline = overlay(recipe, recipe.demo.baseline)
    started = time.monotonic()
    _check(recipe, baseline)
    clock: dict[str, float] = {}
    with ray_session(num_cpus=local_cpus() + 1):
        with _timed(clock, "prepare"):
            prepare.run(recipe)
        with _timed(clock, "train the hybrid"):
            hybrid = train.run(recipe)
        with _timed(clock, "train the baseline"):
            standard = train.run(baseline)
        with _timed(clock, "sweep"):
            swept = sweep.run(with_overrides(recipe, {"train.init_from": str(hybrid.checkpoint)}))
        with _timed(clock, "evaluate"):
            checkpoints = {"hybrid": hybrid.checkpoint, "baseline": standard.checkpoint, "winner": swept.checkpoint}
            scores = {
                name: evaluate.run(with_overrides(recipe, {"evaluate.checkpoint": str(folder)})).metrics
                for name, folder in checkpoints.items()
            }
        with _timed(clock, "promote"):
            promoted = promote.run(recipe)
        with _timed(clock, "deploy"):
            deployment = deploy.start(recipe)
        with deployment:
            with _timed(clock, "ask"):
                right = _ask(recipe, deployment)
            contestants = [
                Contestant(
                    "hybrid",
                    recipe,
                    {**hybrid.metrics, **scores["hybrid"]},
                    hybrid.muon_share,
                    hybrid.seconds,
                    recall_tokens(recipe, hybrid.run_id),
                ),
                Contestant(
                    "baseline",
                    baseline,
                    {**standard.metrics, **scores["baseline"]},
                    standard.muon_share,
                    standard.seconds,
                    recall_tokens(baseline, standard.run_id),
                ),
            ]
            if promoted.winner.checkpoint == swept.checkpoint:
                model = checkpoint.load_config(swept.checkpoint)
                contestants.insert(
                    0,
                    Contestant(
                        "champion",
                        recipe.model_copy(update={"model": model}),
                        {**swept.winner.metrics, **scores["winner"]},
                        hybrid.muon_share,
                        hybrid.seconds + swept.seconds,
                    ),
                )
            winner = promoted.winner.checkpoint
            recall = next(scores[name]["eval/recall"] for name, folder in checkpoints.items() if folder == winner)
            _print_tables(contestants, clock, time.monotonic() - started)
            print(f"champion: {promoted.model_uri} version {promoted.version}, run '{promoted.winner.name}'")
            print(f"asked over HTTP: {right} of {recipe.demo.questions} held-out recall questions answered correctly")
            print(f"MLflow: {ui_command(open_tracking(recipe).uri)}, then http://127.0.0.1:5000")
            if recall < recipe.demo.least_recall:
                raise FiftyfoldError(
                    f"demo.least_recall: the champion's recall is {recall:.1%}, below {recipe.demo.least_recall:.0%}"
                )
            if recipe.demo.keep_serving:
                print(f"endpoint: {deployment.url}/v1 (Ctrl-C stops)", flush=True)
                deployment.serve_until_signal()
            else:
                print(f"endpoint: {deployment.url}/v1, stopped; to serve again: {command_of('deploy')}")


def _check(recipe: Recipe, baseline: Recipe) -> None:
    """Raise ConfigError for settings that a step would refuse only after the training."""
    for each in (recipe, baseline):
        curriculum(each)
    sweep.check(recipe)
    check_section(recipe)
    deploy.check_key(recipe.serve)
    deploy.check_port(recipe.serve.host, recipe.serve.port)
    open_tracking(recipe)


def _ask(recipe: Recipe, deployment: deploy.Deployment) -> int:
    """Ask held-out recall questions over HTTP and print the first; return the number of correct answers."""
    tokenizer = load_tokenizer(deployment.checkpoint)
    questions = retrieval_questions(
        task="mqar",
        length=recipe.data.sequence_length,
        pairs=recipe.data.pairs,
        samples=recipe.demo.questions,
        seed=recipe.evaluate.seed + 1,  # documents that the evaluation has not used
        checkpoint=str(deployment.checkpoint),
        data=str(recipe.data_folder),
    )["test"]
    asked = [questions[i] for i in range(0, len(questions), recipe.data.pairs)]  # one question per document
    headers = deploy.authorization_headers(recipe.serve)
    right = 0
    for number, question in enumerate(asked):
        context, value = question["context"], question["answer"]
        body = {"model": deployment.model_name, "prompt": context, "max_tokens": 1, "temperature": 0}
        try:
            response = httpx.post(
                f"{deployment.url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False
            )
        except httpx.HTTPError as error:
            raise FiftyfoldError(f"{deployment.url}: {first_line(error)}") from error
        if not response.is_success:
            raise FiftyfoldError(f"{deployment.url}: status {response.status_code}: {response.text}")
        content = response.json()
        answer = content["choices"][0]["text"]
        right += answer == value
        if number == 0:
            fact = context[-2:] + value
            distance = len(tokenizer.encode(context[context.index(fact) + len(fact) :]))
            window = checkpoint.load_config(deployment.checkpoint).window
            print(f"prompt: {content['usage']['prompt_tokens']} tokens ending in ...{context[-50:]!r}")
            print(f"  the fact {fact!r} ends {distance} tokens before the end; the sliding window is {window} tokens")
            size = content["fiftyfold"]["cache_nbytes"]
            print(f"  answer {answer!r}, expected {value!r}, from a cache of {size:,} bytes")
    return right


def recall_tokens(recipe: Recipe, run_id: str) -> float:
    """Return the training tokens of a run to :data:`TARGET_RECALL`, interpolated between validations, or infinity."""
    stages = curriculum(recipe)
    history = attach(open_tracking(recipe).uri, run_id).history(RECALL)
    line = [(tokens_after(stages, step), -value) for step, value in history]
    return tokens_to(line, -TARGET_RECALL)


def _format_tokens(tokens: float | None) -> str:
    if tokens is None:
        return "-"
    return f"{tokens:,.0f}" if math.isfinite(tokens) else "not reached"


def _print_tables(contestants: list[Contestant], clock: dict[str, float], total: float) -> None:
    """Print the final tables: the models side by side, and the time of each step."""

    def row(label: str, value: Callable[[Contestant], str]) -> list[str]:
        return [label, *(value(c) for c in contestants)]

    def metric(name: str, spec: str = ".3f") -> Callable[[Contestant], str]:
        return lambda c: format(c.metrics[name], spec) if name in c.metrics else "-"

    length = contestants[0].recipe.evaluate.lengths[0]
    measured = {c.name: measured_cache(c.recipe.model) for c in contestants}
    tokens = int(measured[contestants[0].name]["cache/measured_tokens"])
    baseline = measured[contestants[-1].name][BYTES_PER_TOKEN]
    rows = [
        row("validation loss, text (nats per token)", metric("validation/text_loss")),
        row(f"recall, {length} tokens (lm-eval)", metric("eval/recall", ".1%")),
        row(f"training tokens to {TARGET_RECALL:.0%} validation recall", lambda c: _format_tokens(c.recall_tokens)),
        row(
            "cache bytes per token, closed form", lambda c: f"{sum(cache_bytes_per_token(c.recipe.model).values()):.1f}"
        ),
        row(
            f"cache bytes per token, measured at {tokens:,}",
            lambda c: f"{measured[c.name][BYTES_PER_TOKEN]:.1f}",
        ),
        row(
            "cache, times smaller than the baseline",
            lambda c: f"{baseline / measured[c.name][BYTES_PER_TOKEN]:.1f}",
        ),
        row("Muon / AdamW share of parameters", lambda c: f"{c.muon_share:.0%} / {1 - c.muon_share:.0%}"),
        row("training time (s)", lambda c: f"{c.seconds:.0f}"),
    ]
    print_table("demo", ["", *(c.name for c in contestants)], rows)
    print_table("time", ["step", "seconds"], [[n, f"{s:.0f}"] for n, s in clock.items()] + [["total", f"{total:.0f}"]])


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    yield
    clock[name] = time.monotonic() - started


STEP = Step(run, resumes=True)
