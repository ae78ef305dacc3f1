"""Scheduling of a batch: together or alone, with and without room, from a kept prefix, with long prompts beside."""

import time
from collections import defaultdict

import pytest
import torch

from kernels import native
from model.cache import Cache
from model.decode_graphs import DecodeGraphs
from model.errors import ConfigError
from model.forward.execution import Execution
from serve.engine import EngineConfig, RequestAbortedError, SamplingParams
from serve.engine.prefill_budget import PrefillBudget
from serve.engine.scheduler import Scheduler, _decode_graphs
from serve.engine.sequence import Sequence
from tests.model.rerun import rerun


def sequence(tokenizer, prompt, **params) -> Sequence:
    return Sequence(prompt, SamplingParams(**{"max_tokens": 8, "seed": 1, **params}), tokenizer, time.monotonic() + 600)


def finish(scheduler: Scheduler, sequences: list[Sequence]) -> dict[int, str]:
    """Run all sequences to their ends. Return their texts by ``id``."""
    texts: defaultdict[int, str] = defaultdict(str)
    results = scheduler.step(sequences)
    while scheduler.has_unfinished or results:
        for one, delta in results:
            assert delta.error is None, delta.error
            texts[id(one)] += delta.text
        results = scheduler.step() if scheduler.has_unfinished else []
    return dict(texts)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_prompt(length, length) for length in (1, 15, 40, 64, 65, 130, 200)]


def config(**settings) -> EngineConfig:
    return EngineConfig(
        **{"cache_mebibytes": 16, "kept_prefixes": 0, "prefill_chunk": 64, "prefill_share": 1e9, **settings}
    )


def test_a_batch_takes_one_forward_pass_per_step(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config())
    sequences = [sequence(byte_tokenizer, prompt, max_tokens=20, ignore_eos=True) for prompt in PROMPTS]
    finish(scheduler, sequences)
    assert [one.completion_tokens for one in sequences] == [20] * len(PROMPTS)
    assert scheduler.stats.decoded_tokens == 19 * len(PROMPTS)
    assert scheduler.stats.decode_steps < 40
    assert scheduler.memory.used_pages == 0


def test_recorded_steps_give_the_same_tokens(byte_model, byte_tokenizer, monkeypatch) -> None:
    """Sequences join and leave the batch, which changes the fixed state at the recorded addresses."""
    made = []

    def graphs_of(model, max_batch, cuda_graphs):
        assert cuda_graphs
        made.append(DecodeGraphs(model, max_batch, rerun))
        return made[-1]

    def texts(scheduler):
        sequences = [
            sequence(byte_tokenizer, prompt, max_tokens=8 + 9 * i, temperature=0, ignore_eos=True)
            for i, prompt in enumerate(PROMPTS)
        ]
        finish(scheduler, sequences[::2] + sequences[1::2])
        return [one.tokens for one in sequences]

    with monkeypatch.context() as patch:
        patch.setattr(DecodeGraphs, "if_supported", lambda *_: None)
        expected = texts(Scheduler(byte_model, config(max_active_requests=4)))
    scheduler = Scheduler(byte_model, config(max_active_requests=4))
    if native.level() is not None:
        assert texts(scheduler) == expected and len(scheduler.graphs) >= 4
    monkeypatch.setattr(DecodeGraphs, "if_supported", graphs_of)
    assert texts(Scheduler(byte_model, config(max_active_requests=4))) == expected
    assert len(made) == 1 and made[0].max_batch == 4 and len(made[0]) >= 4


def test_speculation_turns_recorded_steps_off(byte_model, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    with caplog.at_level("INFO"):
        assert _decode_graphs(byte_model, config(speculative_tokens=1)) is None
    assert caplog.messages == [
        "decode steps are not recorded: kernels that read drafted tokens synchronize with the CPU"
    ]


def test_batch_invariant_tokens_are_the_same_alone(byte_model, byte_tokenizer) -> None:
    byte_model.execution = Execution("batch-invariant")
    try:
        make = lambda prompt: sequence(byte_tokenizer, prompt, max_tokens=12, ignore_eos=True, logprobs=1)  # noqa: E731
        together, alone = [make(p) for p in PROMPTS[:5]], [make(p) for p in PROMPTS[:5]]
        finish(Scheduler(byte_model, config(prefill_chunk=32)), together)
        for one in alone:
            finish(Scheduler(byte_model, config(prefill_chunk=512, kept_prefixes=4)), [one])
        assert [one.tokens for one in together] == [one.tokens for one in alone]
    finally:
        byte_model.execution = Execution()


def test_a_full_pool_makes_sequences_wait_and_stops_the_newest(byte_model, byte_tokenizer) -> None:
    roomy = Scheduler(byte_model, config())
    make = lambda: [sequence(byte_tokenizer, p, max_tokens=150, temperature=0, ignore_eos=True) for p in PROMPTS]  # noqa: E731
    expected = finish(roomy, wanted := make())
    tight = Scheduler(byte_model, config())
    pool = tight.memory.pool
    held = pool.allocate(pool.free_pages - 9)
    sequences = make()
    found = finish(tight, sequences)
    assert tight.stats.preemptions > 0
    assert [one.tokens for one in sequences] == [one.tokens for one in wanted]
    assert [found[id(s)] for s in sequences] == [expected[id(s)] for s in wanted]
    pool.release(held)
    assert tight.memory.used_pages == 0


def test_kept_prefixes_make_room_for_running_sequences(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config(kept_prefixes=8))
    pool = scheduler.memory.pool
    held = pool.allocate(pool.free_pages - 4)
    for seed in range(4):
        finish(scheduler, [sequence(byte_tokenizer, random_prompt(150, seed), ignore_eos=True)])
    assert scheduler.stats.preemptions == 0
    while len(scheduler.memory.prefixes):
        scheduler.memory.prefixes.evict()
    pool.release(held)
    assert scheduler.memory.used_pages == 0


def test_a_repeated_prompt_continues_from_its_kept_prefix(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config(kept_prefixes=8))
    page = byte_model.config.page_tokens
    prompt = random_prompt(4 * page + 10)
    first, second = (sequence(byte_tokenizer, prompt, temperature=0, ignore_eos=True) for _ in range(2))
    finish(scheduler, [first])
    assert scheduler.stats.prefill_tokens == len(prompt)
    finish(scheduler, [second])
    assert (first.cached_tokens, second.cached_tokens) == (0, 4 * page)
    assert scheduler.stats.prefill_tokens == len(prompt) + 10
    assert first.tokens == second.tokens
    # Another ending: the first prompt with it is read from the start, the next one from the branch.
    endings = [sequence(byte_tokenizer, prompt[: 2 * page] + random_prompt(page, seed)) for seed in (5, 6)]
    for one in endings:
        finish(scheduler, [one])
    assert [one.cached_tokens for one in endings] == [0, 2 * page]


def test_completions_of_one_prompt_read_it_once(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config(kept_prefixes=8))
    page = byte_model.config.page_tokens
    prompt = random_prompt(2 * page + 10)
    sequences = [sequence(byte_tokenizer, prompt, temperature=0, ignore_eos=True) for _ in range(4)]
    finish(scheduler, sequences)
    assert [one.cached_tokens for one in sequences] == [0, *[2 * page] * 3]
    assert scheduler.stats.prefill_tokens == len(prompt) + 3 * 10
    assert len({tuple(one.tokens) for one in sequences}) == 1
    while len(scheduler.memory.prefixes):
        scheduler.memory.prefixes.evict()
    assert scheduler.memory.used_pages == 0


def test_a_prompt_that_waits_for_pages_copies_no_prefix(byte_model, byte_tokenizer, monkeypatch) -> None:
    scheduler = Scheduler(byte_model, config(kept_prefixes=8))
    page, pool = byte_model.config.page_tokens, scheduler.memory.pool
    prompt = random_prompt(2 * page + 10)
    finish(scheduler, [sequence(byte_tokenizer, prompt)])
    held = pool.allocate(pool.free_pages)
    forks = []
    fork = Cache.fork
    monkeypatch.setattr(Cache, "fork", lambda cache, *rest: forks.append(cache.length) or fork(cache, *rest))
    waiting = sequence(byte_tokenizer, prompt)
    scheduler.step([waiting])
    for _ in range(3):  # of the prefix's own pages, none may be freed for it
        assert scheduler.step() == [] and list(scheduler.waiting) == [waiting]
    assert forks == [] and len(scheduler.memory.prefixes) == 1
    pool.release(held)
    finish(scheduler, [])
    assert forks == [2 * page] and waiting.cached_tokens == 2 * page


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_may_fill_all_pages(byte_model, byte_tokenizer, max_tokens) -> None:
    scheduler = Scheduler(byte_model, config())
    pool = scheduler.memory.pool
    pool.allocate(pool.free_pages - 2)
    one = sequence(byte_tokenizer, random_prompt(2 * byte_model.config.page_tokens), max_tokens=max_tokens)
    results = scheduler.step([one])
    for _ in range(4):
        results += scheduler.step()
    assert [delta.finish_reason for found, delta in results if found is one] == ["length"]


def test_prompt_logprobs_do_not_skip_a_kept_prefix(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config(kept_prefixes=8))
    prompt = random_prompt(150)
    for _ in range(2):
        one = sequence(byte_tokenizer, prompt, prompt_logprobs=True, logprobs=0)
        finish(scheduler, [one])
        assert [record.token_id for record in one.prompt_logprobs] == prompt
        assert one.cached_tokens == 0


def test_a_preempted_sequence_keeps_its_prompt_logprobs_and_continues_from_a_prefix(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config(kept_prefixes=8))
    page, pool = byte_model.config.page_tokens, scheduler.memory.pool
    prompt = random_prompt(2 * page + page // 2)
    one = sequence(byte_tokenizer, prompt, prompt_logprobs=True, logprobs=1, max_tokens=page, ignore_eos=True)
    scheduler.step([one])
    while not len(scheduler.batch):
        scheduler.step()
    scored, read = list(one.prompt_logprobs), scheduler.stats.prefill_tokens
    held = pool.allocate(pool.free_pages)
    while not scheduler.stats.preemptions:
        scheduler.step()
    generated = one.completion_tokens
    pool.release(held)
    finish(scheduler, [])
    assert one.completion_tokens == page and one.prompt_logprobs == scored and len(scored) == len(prompt)
    assert scheduler.stats.prefill_tokens - read == page // 2 + generated


def test_stop_token_ids_and_ignore_eos(byte_model, byte_tokenizer) -> None:
    def generated(**params) -> list[int]:
        one = sequence(byte_tokenizer, [5, 6], max_tokens=30, seed=3, **params)
        finish(Scheduler(byte_model, config()), [one])
        return one.tokens[2:]

    whole = generated(ignore_eos=True)
    assert len(whole) == 30
    at = next(i for i in range(3, 30) if whole[i] not in whole[:i])
    assert generated(ignore_eos=True, stop_token_ids=(whole[at],)) == whole[: at + 1]


def test_an_expired_or_aborted_sequence_leaves_the_batch(byte_model, byte_tokenizer, monkeypatch) -> None:
    scheduler = Scheduler(byte_model, config())
    sequences = [sequence(byte_tokenizer, p, max_tokens=40, ignore_eos=True) for p in PROMPTS[:3]]
    sequences[2].deadline -= 300
    scheduler.step(sequences)
    scheduler.step()
    monkeypatch.setattr("serve.engine.scheduler.time.monotonic", lambda: sequences[2].deadline + 1)
    assert [one for one, delta in scheduler.step() if delta.error] == [sequences[2]]
    scheduler.abort(sequences[1])
    assert [one for one, delta in scheduler.step() if delta.error] == [sequences[1]]
    assert scheduler.batch.sequences == [sequences[0]]
    finish(scheduler, [])
    assert sequences[0].completion_tokens == 40
    assert scheduler.memory.used_pages == 0


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"temperature": 0}])
def test_logits_that_are_not_finite_fail_their_sequence_only(byte_model, byte_tokenizer, params, monkeypatch) -> None:
    scheduler = Scheduler(byte_model, config())
    sequences = [sequence(byte_tokenizer, p, ignore_eos=True, **params) for p in PROMPTS[:3]]
    scheduler.step(sequences)
    forward = scheduler.batch.forward

    def broken(*arguments) -> torch.Tensor:
        logits = forward(*arguments).clone()
        logits[1] = float("nan")
        return logits

    monkeypatch.setattr(scheduler.batch, "forward", broken)
    results = scheduler.step()
    assert [one for one, delta in results if delta.error is not None] == [sequences[1]]
    monkeypatch.undo()
    finish(scheduler, [])
    assert [one.completion_tokens for one in sequences] == [8, 1, 8]


def test_memory_too_small_for_the_fixed_state_is_refused(byte_model) -> None:
    with pytest.raises(ConfigError, match="cache_mebibytes: 1 MiB do not hold"):
        Scheduler(byte_model, EngineConfig(cache_mebibytes=1, max_active_requests=10_000))


def test_prompts_are_read_in_their_share_of_the_time() -> None:
    budget = PrefillBudget(chunk=512, share=1.0)
    seconds_per_token, decode_seconds = 1e-4, 4e-3
    assert budget.tokens(10_000, decoding=False) == 512
    budget.read(512, 512 * seconds_per_token, decoding=False)
    read = 0
    for _ in range(1000):
        count = budget.tokens(10_000, decoding=True)
        if count:
            budget.read(count, count * seconds_per_token, decoding=True)
        read += count
        budget.decoded(decode_seconds)
    assert read * seconds_per_token == pytest.approx(1000 * decode_seconds, rel=0.1)
    assert budget.tokens(10, decoding=True) in (0, 10)


def test_a_sequence_that_is_aborted_before_it_arrives_never_runs(byte_model, byte_tokenizer) -> None:
    scheduler = Scheduler(byte_model, config())
    late = sequence(byte_tokenizer, PROMPTS[0])
    scheduler.abort(late)
    scheduler.step()  # looks for aborted sequences while this one is on its way
    [(one, delta)] = scheduler.step([late])
    assert one is late and isinstance(delta.error, RequestAbortedError)
    assert not scheduler.has_unfinished and late.completion_tokens == 0


@pytest.mark.parametrize("logprobs", [None, 1])
def test_logits_that_are_not_finite_end_their_sequence_only(byte_model, byte_tokenizer, monkeypatch, logprobs) -> None:
    scheduler = Scheduler(byte_model, config())
    scheduler.model_label = "model 'tiny'"
    sequences = [
        sequence(byte_tokenizer, p, max_tokens=10, ignore_eos=True, logprobs=logprobs, frequency_penalty=0.1)
        for p in PROMPTS[:3]
    ]
    scheduler.step(sequences)
    logits = byte_model.logits
    with monkeypatch.context() as patch:
        patch.setattr(byte_model, "logits", lambda streams: logits(streams).index_fill(0, torch.tensor(1), torch.nan))
        errors = [(one, delta.error) for one, delta in scheduler.step() if delta.error is not None]
    assert [(one, str(error)) for one, error in errors] == [
        (sequences[1], "model 'tiny' computed logits that are not finite")
    ]
    finish(scheduler, [])
    assert [one.completion_tokens for one in sequences] == [10, 1, 10]
