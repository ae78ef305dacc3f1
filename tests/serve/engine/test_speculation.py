"""Speculative decoding: the same completions as without drafts, in fewer steps."""

import itertools
import time
from collections import Counter

import pytest
import torch

from kernels.cache_io import unpack
from model.cache import Cache
from model.config import ModelConfig
from model.errors import ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.execution import Execution
from model.transformer import Transformer
from serve.engine import Delta, EngineConfig, SamplingParams
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence
from serve.engine.speculation import Drafter

PAGE = 64
LENGTHS = (1, 2, 15, 40, PAGE, PAGE + 1, 150)


def random_model(vocab_size: int = 258, seed: int = 0, std: float = 0.3, **changes) -> Transformer:
    torch.manual_seed(seed)
    shape = {"init_std": std, "zero_init_output": False, "max_positions": 512, "mtp_layers": 1}
    return Transformer(ModelConfig.from_preset("tiny", vocab_size=vocab_size, **shape, **changes)).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A model with bit-identical logits whatever the batch, whose module guesses some tokens and misses others."""
    model = random_model()
    _make_module_agree(model)
    model.execution = Execution("batch-invariant")
    return model


def _make_module_agree(model: Transformer) -> None:
    """Let most tokens depend on the one before alone, in the network and in its module, whose block adds little."""
    module = model.mtp[0]
    with torch.no_grad():
        for block in (*model.layers, module):
            for parameter in (block.attn.wo_b.weight, block.ffn.w2, block.ffn.shared.w2.weight):
                parameter *= 0.002
        module.h_proj.weight.zero_()
        module.e_proj.weight.copy_(torch.eye(model.config.hidden_size))
        # The module's input is normalized; head and norms see the direction only.
        module.norm.weight.copy_(model.norm.weight)


def make(tokenizer, prompt: list[int], **params) -> Sequence:
    settings = {"max_tokens": 24, "seed": 1, "ignore_eos": True, **params}
    return Sequence(prompt, SamplingParams(**settings), tokenizer, time.monotonic() + 600)


def prompt_of(length: int, vocab: int = 250) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def config(drafts: int, **settings) -> EngineConfig:
    defaults = {"cache_mebibytes": 24, "kept_prefixes": 0, "prefill_chunk": 64, "prefill_share": 1e9}
    return EngineConfig(**{**defaults, "speculative_tokens": drafts, **settings})


def finish(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[Delta]]:
    """Run sequences to their ends. Return the outputs of each."""
    found: dict[int, list[Delta]] = {id(sequence): [] for sequence in sequences}
    results = scheduler.step(sequences)
    while scheduler.has_unfinished or results:
        for sequence, delta in results:
            assert delta.error is None, delta.error
            found[id(sequence)].append(delta)
        results = scheduler.step() if scheduler.has_unfinished else []
    return [found[id(sequence)] for sequence in sequences]


def run(model, tokenizer, drafts: int, settings: dict, **engine) -> tuple[list, Scheduler]:
    scheduler = Scheduler(model, config(drafts, **engine))
    sequences = [make(tokenizer, prompt_of(length), **settings) for length in LENGTHS]
    deltas = finish(scheduler, sequences)
    outputs = [(one.tokens, Delta.join(found)) for one, found in zip(sequences, deltas)]
    while len(scheduler.memory.prefixes):
        scheduler.memory.prefixes.evict()
    assert scheduler.memory.used_pages == 0
    return outputs, scheduler


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.8},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.5, "logit_bias": {7: 50.0, 9: 50.0}, "logprobs": 2},
        {"temperature": 0.3, "min_tokens": 7, "stop_token_ids": tuple(range(0, 256, 2)), "logprobs": 0},
        {"temperature": 0.5, "stop": ("e", "t"), "logprobs": 1},
    ],
    ids=["greedy", "sampled", "truncated", "penalties", "bias", "min_tokens", "stop_strings"],
)
def test_completions_are_those_without_drafts(model, byte_tokenizer, drafts, settings) -> None:
    plain, _ = run(model, byte_tokenizer, 0, settings)
    drafted, scheduler = run(model, byte_tokenizer, drafts, settings, kept_prefixes=4)
    assert drafted == plain
    assert 0 < scheduler.stats.accepted_tokens <= scheduler.stats.drafted_tokens


def test_accepted_drafts_save_steps(model, byte_tokenizer) -> None:
    _, plain = run(model, byte_tokenizer, 0, {"temperature": 0})
    _, drafted = run(model, byte_tokenizer, 2, {"temperature": 0})
    stats = drafted.stats
    assert stats.decoded_tokens == plain.stats.decoded_tokens == 23 * len(LENGTHS)
    assert 0.2 * stats.decoded_tokens < stats.accepted_tokens < stats.drafted_tokens
    assert stats.decode_steps < plain.stats.decode_steps


def test_completions_are_those_without_drafts_in_auto_mode(byte_tokenizer) -> None:
    model = random_model()
    _make_module_agree(model)
    for settings in ({"temperature": 0}, {"temperature": 0.7}):
        plain, _ = run(model, byte_tokenizer, 0, settings)
        drafted, scheduler = run(model, byte_tokenizer, 2, settings)
        # A wider pass rounds differently, so that a rare token on the edge may differ.
        same = sum(a[0] == b[0] for a, b in zip(plain, drafted))
        assert same >= len(LENGTHS) - 1
        assert scheduler.stats.accepted_tokens > 0


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8}])
def test_a_full_pool_and_a_full_context(model, byte_tokenizer, settings) -> None:
    long = {**settings, "max_tokens": 512 - max(LENGTHS)}
    plain, _ = run(model, byte_tokenizer, 0, {**long, "max_tokens": 120})
    scheduler = Scheduler(model, config(3))
    pool = scheduler.memory.pool
    held = pool.allocate(pool.free_pages - 12)
    sequences = [make(byte_tokenizer, prompt_of(length), **{**long, "max_tokens": 120}) for length in LENGTHS]
    finish(scheduler, sequences)
    assert scheduler.stats.preemptions > 0
    assert [one.tokens for one in sequences] == [tokens for tokens, _ in plain]
    pool.release(held)
    assert scheduler.memory.used_pages == 0

    full = make(byte_tokenizer, prompt_of(150), **long)
    finish(Scheduler(model, config(3)), [full])
    assert len(full.tokens) == 512


def test_a_sequence_leaves_after_another_has_joined(model, byte_tokenizer) -> None:
    scheduler = Scheduler(model, config(2))
    first, second = (make(byte_tokenizer, prompt_of(length)) for length in (15, 40))
    scheduler.step([first])
    scheduler.step([second])
    assert scheduler.batch.sequences == [first, second]
    scheduler.abort(first)
    [left] = [sequence for sequence, delta in scheduler.step() if delta.error]
    assert left is first
    while scheduler.has_unfinished:
        scheduler.step()
    assert second.completion_tokens == 24
    assert scheduler.memory.used_pages == 0


def test_a_draft_is_the_prediction_of_the_whole_sequence(byte_tokenizer) -> None:
    """The first draft after a prompt, in any pieces, equals the module's prediction without a cache."""
    model = random_model()
    prompt = prompt_of(150)
    for chunk, kept in ((512, 0), (64, 0), (7, 0), (64, 4)):
        scheduler = Scheduler(model, config(2, prefill_chunk=chunk, kept_prefixes=kept))
        for _ in range(1 + bool(kept)):
            one = make(byte_tokenizer, prompt, temperature=0)
            scheduler.step([one])
            while not one.drafts:
                scheduler.step()
            scheduler.batch.remove([one])
        assert one.cached_tokens == (128 if kept else 0)
        aux = AuxOutputs(predict_ahead=True)
        with torch.inference_mode():
            model(torch.tensor([[*prompt, one.tokens[150]]]), aux=aux)
        assert aux.mtp_logits is not None
        assert one.drafts[0] == int(aux.mtp_logits[0, -1].argmax())


def test_the_module_reads_what_the_network_read(byte_tokenizer) -> None:
    """After steps with accepted and rejected drafts, the module's cache is that of reading the tokens at once."""
    model = random_model()
    _make_module_agree(model)
    scheduler = Scheduler(model, config(3))
    sequences = [make(byte_tokenizer, prompt_of(length), temperature=0.5, max_tokens=60) for length in LENGTHS]
    scheduler.step(sequences)
    while scheduler.stats.decode_steps < 15:
        scheduler.step()
    assert 0 < scheduler.stats.accepted_tokens < scheduler.stats.drafted_tokens
    assert scheduler.batch.cache is not None
    for sequence, cache in zip(list(scheduler.batch.sequences), scheduler.batch.cache.split()):
        length = len(sequence.tokens) - 1
        assert cache.lengths == [length]
        fresh = Cache(model.config, 1, 512, rewind=3, predicts_ahead=True)
        with torch.inference_mode():
            streams = model.read(torch.tensor([sequence.tokens[:-1]]), fresh)
            model.read_ahead(streams, torch.tensor([sequence.tokens[1:]]), fresh, [0])
        assert fresh.ahead is not None and cache.ahead is not None
        layout = model.mtp[0].attn.precision.main_layout
        reach = min(length, model.config.window - 1)
        rows = [unpack(c.ahead.window.read(reach), layout) for c in (fresh, cache)]
        different = ((rows[0] - rows[1]).abs() > 0.1 * rows[0].abs().amax()).float().mean()
        assert different < 0.02  # values on the edge of rounding


def _chi_square(found: Counter, expected: dict[tuple[int, ...], float], count: int) -> float:
    """Return Pearson's statistic, with cells of fewer than 5 expected taken together, over its degrees of freedom's
    99.99th percentile (normal approximation of the cube root)."""
    cells = [(found[key], count * p) for key, p in expected.items() if count * p >= 5]
    rest = [(found[key], count * p) for key, p in expected.items() if count * p < 5]
    if rest:
        cells.append((sum(n for n, _ in rest), max(sum(e for _, e in rest), 1e-9)))
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return statistic / limit


def test_the_distribution_of_samples_is_the_network_s(letters, monkeypatch) -> None:
    """Three tokens of a vocabulary of four, the second and third of which are drafted, by Pearson's test."""
    vocab, tokens, count = 4, 3, 4000
    model = random_model(vocab, seed=2, std=0.1)
    prompt = [0, 3, 2]
    with torch.inference_mode():
        expected: dict[tuple[int, ...], float] = {}
        for ids in itertools.product(range(vocab), repeat=tokens):
            logprobs = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected[ids] = float(logprobs[range(tokens), list(ids)].sum().exp())
    assert sum(expected.values()) == pytest.approx(1, abs=1e-3)

    def sample(count: int) -> tuple[Counter, Scheduler]:
        scheduler = Scheduler(model, config(2, kept_prefixes=4))
        sequences = [make(letters, prompt, max_tokens=tokens, seed=seed) for seed in range(count)]
        finish(scheduler, sequences)
        return Counter(tuple(one.tokens[len(prompt) :]) for one in sequences), scheduler

    found, scheduler = sample(count)
    assert 0.1 < scheduler.stats.accepted_tokens / scheduler.stats.drafted_tokens < 0.95
    assert _chi_square(found, expected, count) < 1

    # The test sees a fault, in fewer samples: drafts that are taken without being sampled.
    unchecked = Scheduler._sample

    def take_drafts(self, logits, sequences):
        for row, sequence in enumerate(sequences):
            place = sequence.completion_tokens - 1
            if sequence.drafts and place < len(sequence.drafts) and sequence.sampler.generated % 2:
                logits = logits.clone()
                logits[row, sequence.drafts[0]] += 1.0
        return unchecked(self, logits, sequences)

    monkeypatch.setattr(Scheduler, "_sample", take_drafts)
    assert _chi_square(sample(1000)[0], expected, 1000) > 1


def test_models_that_cannot_speculate_are_refused(byte_model) -> None:
    with pytest.raises(ConfigError, match=r"^speculative_tokens: the model has no .*; expected 0, found 1$"):
        Scheduler(byte_model, config(1))
    recurrent = random_model(layers=("mamba2", "csa"))
    with pytest.raises(
        ConfigError, match=r"speculative_tokens: layers of 'mamba2' keep a recurrent state.*; expected 0, found 1$"
    ):
        Drafter(recurrent, 1)
