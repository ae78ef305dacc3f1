"""Mixers of every kind in the engine: the tokens of a completion do not depend on batches, prefixes or preemption."""

import time

import pytest
import torch

from model.config import ModelConfig
from model.forward.execution import Execution
from model.transformer import Transformer
from serve.engine import EngineConfig, SamplingParams
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence

SCHEDULES = {
    "recurrent": ("mamba2", "kda"),
    "hybrid": ("kda", "csa", "mamba2", "hca"),
    "latent": ("mla", "dsa", "gqa"),
    "every": ("sliding", "csa", "hca", "gqa", "mla", "dsa", "mamba2", "kda"),
}
OPTIONS = {"mamba2": {"head_dim": 32, "state_size": 16}, "kda": {"num_heads": 2, "head_dim": 16}}
LENGTHS = (1, 30, 64, 70, 135)
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=SCHEDULES)
def model(request) -> Transformer:
    """A random network with bit-identical logits whatever the batch."""
    torch.manual_seed(0)
    layers = SCHEDULES[request.param]
    config = ModelConfig.from_preset(
        "tiny",
        layers=layers,
        mixer_options={name: options for name, options in OPTIONS.items() if name in layers},
        num_hash_layers=0,
        init_std=0.3,
        max_positions=512,
        zero_init_output=False,
    )
    model = Transformer(config).eval()
    model.execution = Execution("batch-invariant")
    return model


def make(tokenizer, length: int, seed: int = 1, new_tokens: int = NEW_TOKENS) -> Sequence:
    prompt = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    params = SamplingParams(max_tokens=new_tokens, seed=seed, ignore_eos=True)
    return Sequence(prompt, params, tokenizer, time.monotonic() + 600)


def scheduler_of(model, **settings) -> Scheduler:
    defaults = {"cache_mebibytes": 48, "kept_prefixes": 0, "prefill_chunk": 48, "prefill_share": 1e9}
    return Scheduler(model, EngineConfig(**{**defaults, **settings}))


def finish(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[int]]:
    results = scheduler.step(sequences)
    while scheduler.has_unfinished or results:
        assert all(delta.error is None for _, delta in results)
        results = scheduler.step() if scheduler.has_unfinished else []
    while len(scheduler.memory.prefixes):
        scheduler.memory.prefixes.evict()
    assert scheduler.memory.used_pages == 0
    return [sequence.tokens for sequence in sequences]


def alone(model, tokenizer, length: int, seed: int = 1, new_tokens: int = NEW_TOKENS) -> list[int]:
    [tokens] = finish(scheduler_of(model, prefill_chunk=512), [make(tokenizer, length, seed, new_tokens)])
    return tokens


def test_a_ragged_batch_that_sequences_join_and_leave(model, byte_tokenizer) -> None:
    counts = [NEW_TOKENS - 2 * i for i in range(len(LENGTHS))]
    sequences = [make(byte_tokenizer, length, new_tokens=n) for length, n in zip(LENGTHS, counts)]
    scheduler = scheduler_of(model)
    scheduler.step(sequences[:2])
    found = finish(scheduler, sequences[2:])
    expected = [alone(model, byte_tokenizer, length, new_tokens=n) for length, n in zip(LENGTHS, counts)]
    assert found == expected[2:]
    assert [one.tokens for one in sequences[:2]] == expected[:2]


def test_a_full_pool_stops_sequences_that_are_read_again(model, byte_tokenizer) -> None:
    if not scheduler_of(model).memory.pool.parts:
        pytest.skip("a cache without growing parts has no pages")
    scheduler = scheduler_of(model)
    pool = scheduler.memory.pool
    held = pool.allocate(pool.free_pages - 6)
    # The prompts of 30 and 64 tokens grow into further pages.
    sequences = [make(byte_tokenizer, length, new_tokens=40) for length in (64, 30, 63, 62)]
    results = scheduler.step(sequences)
    while scheduler.has_unfinished or results:
        assert all(delta.error is None for _, delta in results)
        results = scheduler.step() if scheduler.has_unfinished else []
    assert scheduler.stats.preemptions > 0
    assert [one.tokens for one in sequences] == [
        alone(model, byte_tokenizer, length, new_tokens=40) for length in (64, 30, 63, 62)
    ]
    pool.release(held)
    assert scheduler.memory.used_pages == 0


def test_a_kept_prefix_continues_a_prompt(model, byte_tokenizer) -> None:
    scheduler = scheduler_of(model, kept_prefixes=8)
    first, second = make(byte_tokenizer, 135), make(byte_tokenizer, 135)
    while not first.completion_tokens:
        scheduler.step([first] if not first.computed else ())
    [found] = finish(scheduler, [second])
    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert first.tokens == found == alone(model, byte_tokenizer, 135)


def test_completions_of_one_prompt_are_independent(model, byte_tokenizer) -> None:
    scheduler = scheduler_of(model, kept_prefixes=8)
    sequences = [make(byte_tokenizer, 70, seed) for seed in range(3)]
    found = finish(scheduler, sequences)
    assert [one.cached_tokens for one in sequences] == [0, 64, 64]
    assert scheduler.stats.prefill_tokens == 70 + 2 * 6
    assert found == [alone(model, byte_tokenizer, 70, seed) for seed in range(3)]
    assert len({tuple(tokens) for tokens in found}) == 3
