"""The lm-eval model: scores and text from the cache equal those of the full forward pass."""

from __future__ import annotations

import shutil

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizer_files import byte_level, unigram, write_files

from evals.lm import CheckpointLM, _prefix_chains
from model import checkpoint as checkpoints
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import CheckpointError, ConfigError
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.tokenizer.byte import byte_character
from model.transformer import Transformer

CONFIG = ModelConfig(
    hidden_size=64,
    layers=("sliding", "csa", "hca"),
    max_positions=96,
    hca_ratio=16,
    index_topk=4,
    init_std=0.15,  # at 0.02 the distribution is almost uniform and would hide a wrong position
    qat=False,
    **dict.fromkeys(CACHE_FORMATS, "fp32"),  # without rounding, scores do not depend on the chunks
)
TEXT = "def recall(doc, results):\n    return {'recall': float(results[0] == doc['value'])}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "final"
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.head.weight[:34] = model.head.weight[129:] = (
            0.0  # generates printable ASCII, so that different tokens give different texts
        )
    checkpoints.save(model, folder, ByteTokenizer())
    return folder


@pytest.fixture
def lm(folder):
    return CheckpointLM(folder, prefill_chunk=7)  # divides neither the ratios, the window, nor the texts


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def full_scores(lm, ids):
    """Return log-probabilities [S, vocab] of a sequence, computed without a cache."""
    with torch.inference_mode():
        return lm._model(torch.tensor([ids]))[0].log_softmax(-1)


def expected(lm, context, continuation):
    ids = lm.tok_encode(context + continuation)
    start = len(lm.tok_encode(context))
    scores = full_scores(lm, ids[:-1])[start - 1 :]
    target = torch.tensor(ids[start:])
    total = scores.gather(1, target[:, None]).sum().item()
    return total, bool((scores.argmax(-1) == target).all())


def test_loglikelihood_equals_the_full_forward(lm):
    pairs = [(TEXT[:n], TEXT[n : n + m]) for n, m in [(60, 20), (13, 1), (1, 40), (60, 1), (60, 2), (15, 17), (64, 1)]]
    pairs += [("", TEXT[:30]), (TEXT[:20], "ab"), (TEXT[:20], "cd"), (TEXT[:20], "x"), (TEXT[:20], "y")]
    results = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for pair, (total, greedy) in zip(pairs, results):
        assert (total, greedy) == (pytest.approx(expected(lm, *pair)[0], abs=1e-4), expected(lm, *pair)[1]), pair
    assert len({round(total, 3) for total, _ in results}) == len(pairs)


def test_greedy_flag_is_set_for_the_greedy_continuation(lm):
    ids = lm.tok_encode(TEXT[:30])
    best = full_scores(lm, ids)[-1].topk(2).indices.tolist()
    scored = lm._loglikelihood_tokens([(("", ""), ids, [token]) for token in best], disable_tqdm=True)
    assert [greedy for _, greedy in scored] == [True, False]

    # One wrong token before twelve greedy ones, which exceed a chunk: the continuation is not greedy.
    wrong = [*ids, best[1]]
    for _ in range(12):
        wrong.append(full_scores(lm, wrong)[-1].argmax().item())
    pairs = [(("", ""), wrong[: len(ids)], wrong[len(ids) :]), (("", ""), wrong[: len(ids) + 1], wrong[len(ids) + 1 :])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [False, True]


def test_generation_equals_the_argmax_loop(lm):
    prompts = [TEXT[:40], TEXT[5:45], TEXT[:33], TEXT[:40] + "@", "x"]
    arguments = [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in prompts]
    for prompt, text in zip(prompts, lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)):
        ids = lm.tok_encode(prompt)
        for _ in range(12):
            ids.append(full_scores(lm, ids)[-1].argmax().item())
        assert text == ByteTokenizer().decode(ids[-12:]), prompt


def test_shared_prefixes_are_prefilled_once(lm):
    prompts = [TEXT[:n] for n in (40, 44, 45, 60)] + [TEXT[10 : 10 + n] for n in (40, 44, 45, 60)] + [TEXT[:40]]
    arguments = [(prompt, {"until": [], "max_gen_toks": 5}) for prompt in prompts]
    together = lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    alone = [lm.generate_until(requests("generate_until", [one]), disable_tqdm=True)[0] for one in arguments]
    assert together == alone
    assert len(set(together)) > 4

    read = []
    forward = lm._model.forward
    lm._model.forward = lambda ids, *rest, **more: read.append(ids.numel()) or forward(ids, *rest, **more)
    lm.generate_until(requests("generate_until", [(p, {"max_gen_toks": 1}) for p in prompts]), disable_tqdm=True)
    assert sum(read) == 2 * (60 + 1)  # two chains, BOS in each


def test_prefix_chains():
    prompts = [(1, 2), (1,), (3, 4), (1, 2, 5), (1, 3)]
    assert _prefix_chains(prompts) == [[(1,), (1, 2), (1, 2, 5)], [(1, 3)], [(3, 4)]]


def test_stop_strings_and_eos(lm):
    def generate(**arguments):
        one = requests("generate_until", [(TEXT[:40], {"max_gen_toks": 12, **arguments})])
        return lm.generate_until(one, disable_tqdm=True)[0]

    whole = generate(until=[])
    letters = sorted(set(whole[2:]) - set(whole[:2]), key=whole.index)
    assert letters, whole
    place = whole.index(letters[0])
    assert generate(until=[letters[0]]) == whole[:place]
    assert generate(until=letters[0]) == whole[:place]
    # Of two stop strings that end at the same position, the one that starts first counts.
    assert generate(until=[letters[0], whole[place - 1 : place + 1]]) == whole[: place - 1]
    assert generate(until=["never this"]) == whole
    lm._tokenizer.extra_stop_ids = frozenset(lm.tok_encode(letters[0])[-1:])
    assert generate(until=[]) == whole[:place]


def load_with(tokenizer_folder, folder):
    """Return an lm of the model in ``folder``, with another tokenizer of at most as many IDs."""
    lm = CheckpointLM(folder, prefill_chunk=7)
    lm._tokenizer = load_tokenizer(tokenizer_folder, model_vocab_size=lm._model.config.vocab_size)
    return lm


def score(lm, context_ids, ids):
    """Return the log-likelihood of ``ids`` after ``context_ids`` by a full forward pass."""
    rows = full_scores(lm, [*context_ids, *ids][:-1])[-len(ids) :]
    return rows.gather(1, torch.tensor(ids)[:, None]).sum().item()


def loglikelihood(lm, *pairs):
    return [total for total, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]


def test_a_continuation_that_merges_with_its_context_is_encoded_alone(tmp_path, folder):
    content = {**byte_level(), "added_tokens": []}
    vocabulary = content["model"]["vocab"]
    vocabulary["ab"] = vocabulary.pop(byte_character(255))  # the model has no room for another ID
    content["model"]["merges"] = [["a", "b"]]
    lm = load_with(write_files(tmp_path, content), folder)
    a, b, c, d = (ord(letter) + 2 for letter in "abcd")
    assert lm.tok_encode("cab") == [0, c, 257]
    scores = loglikelihood(lm, ("ca", "b"), ("ca", "bd"), ("ca", "bb"), ("c", "ab"), ("", "ab"))
    expected = [([0, c, a], [b]), ([0, c, a], [b, d]), ([0, c, a], [b, b]), ([0, c], [257]), ([0], [257])]
    assert scores == pytest.approx([score(lm, *pair) for pair in expected], abs=1e-4)
    assert max(scores) < 0


def test_no_space_is_added_in_front_of_a_continuation(tmp_path, folder):
    """The tokenizer puts a space in front of what it encodes, and "xy" is one token."""
    content = unigram("xyz")
    content["model"]["vocab"].append(["xy", -1.0])
    lm = load_with(write_files(tmp_path, content), folder)
    x, y = lm._tokenizer.encode_inside("x"), lm._tokenizer.encode_inside("y")
    context = lm.tok_encode("zx")
    assert context[-1:] == x and lm.tok_encode("zxy")[-1] not in (*x, *y)
    assert loglikelihood(lm, ("zx", "y")) == pytest.approx([score(lm, context, y)], abs=1e-4)


@pytest.mark.parametrize("context", ["", "ca", "ca "])
def test_an_empty_continuation_is_refused(lm, context):
    with pytest.raises(ConfigError, match=f"the context '{context}' and the continuation '': .* is empty"):
        loglikelihood(lm, ("a", "b"), (context, ""))


def test_a_continuation_without_tokens_is_refused(tmp_path, folder):
    content = byte_level()
    del content["model"]["vocab"]["z"]  # unknown characters are dropped
    lm = load_with(write_files(tmp_path, content), folder)
    for context in ("a", ""):
        with pytest.raises(ConfigError, match="and the continuation 'z': the tokenizer has no tokens for"):
            loglikelihood(lm, (context, "z"))
    with pytest.raises(ConfigError, match="has no tokens for the text 'zz'"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("a",), ("zz",)]), disable_tqdm=True)


def test_spellings_of_special_tokens_are_scored_as_text(lm):
    spelled = lm._tokenizer.eos_token
    assert lm.tok_encode(f"a{spelled}") == [0, *(byte + 2 for byte in f"a{spelled}".encode())]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "final")
    write_files(tmp_path / "final", byte_level(added=["<|im_end|>"]))
    with pytest.raises(ConfigError, match="has token IDs up to 258, but the model has a vocabulary of 258"):
        CheckpointLM(tmp_path / "final")


def test_rolling_scores_every_token_once_within_the_context(lm):
    long = TEXT * 3
    assert len(long) > 2 * CONFIG.max_positions
    short_score, long_score, empty = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(TEXT[:50],), (long,), ("",)]), disable_tqdm=True
    )
    assert empty == 0.0
    assert short_score == pytest.approx(expected(lm, "", TEXT[:50])[0], abs=1e-4)

    ids = lm.tok_encode(long)
    size, total = CONFIG.max_positions, 0.0
    for start in range(1, len(ids), size):  # a window predicts ids[start:end] from the `size` tokens before end - 1
        end = min(start + size, len(ids))
        window = ids[max(0, end - 1 - size) : end]
        scores = full_scores(lm, window[:-1])[-(end - start) :]
        total += scores.gather(1, torch.tensor(window[-(end - start) :])[:, None]).sum().item()
    assert long_score == pytest.approx(total, rel=1e-6)


def test_sequences_longer_than_the_context_are_refused(lm):
    fits = "x" * (CONFIG.max_positions - 1)  # one position is left for BOS
    lm.loglikelihood(requests("loglikelihood", [(fits, "y")]), disable_tqdm=True)
    lm.generate_until(requests("generate_until", [(fits, {"max_gen_toks": 1})]), disable_tqdm=True)
    with pytest.raises(ConfigError, match="need 97 positions, but the model's context has 96"):
        lm.loglikelihood(requests("loglikelihood", [(fits, "yz")]), disable_tqdm=True)
    with pytest.raises(ConfigError, match="need 97 positions, but the model's context has 96"):
        lm.generate_until(requests("generate_until", [(fits, {"max_gen_toks": 2})]), disable_tqdm=True)


def test_sampling_is_refused(lm):
    with pytest.raises(ConfigError, match="do_sample"):
        lm.generate_until(requests("generate_until", [("x", {"do_sample": True, "temperature": 1.0})]))


def record_batches(model):
    """Return a list to which every forward pass appends its number of rows."""
    sizes, forward = [], model.forward
    model.forward = lambda ids, *rest, **more: (sizes.append(len(ids)), forward(ids, *rest, **more))[1]
    return sizes


def test_batches_hold_at_most_batch_size_prompts(folder):
    pairs = [(TEXT[i : i + 20], "ab") for i in range(6)]
    expected = CheckpointLM(folder).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for given, limit, size in ((3, None, 3), ("2", None, 2), ("auto", None, 6), ("auto:4", 5, 5)):
        lm = CheckpointLM(folder, batch_size=given, max_batch_size=limit)
        sizes = record_batches(lm._model)
        found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
        assert max(sizes) == size
    for wrong in (0, -1, "many"):
        with pytest.raises(ConfigError, match=r"^batch_size: expected a number of prompts or auto, found"):
            CheckpointLM(folder, batch_size=wrong)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        CheckpointLM(tmp_path / "nowhere")
