"""lm-eval model that decodes a checkpoint from the compressed cache.

Prompts are prefilled into :class:`model.cache.Cache` in chunks. Prompts of equal length form a batch, and a prompt that
is a prefix of another (as with several questions about one document) is prefilled once for both.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from model import checkpoint as checkpoints
from model.cache import Cache
from model.errors import ConfigError
from model.generation import prefill
from model.tokenizer import load_tokenizer
from model.tokenizer.stop_strings import StopStrings
from model.tokenizer.streaming import GeneratedText
from model.wording import count, quote

Tokens = tuple[int, ...]
Item = TypeVar("Item")


class CheckpointLM(TemplateLM):
    """lm-eval ``LM`` with greedy decoding, for the checkpoint in a folder.

    Prefill processes ``prefill_chunk`` tokens of each prompt at a time. A batch holds at most ``batch_tokens`` tokens,
    or a single prompt, and at most ``batch_size`` prompts; ``auto`` sets no such limit. ``max_batch_size`` limits
    ``auto``. lm-eval's command line passes these arguments from ``--model_args``, ``--device``, ``--batch_size`` and
    ``--max_batch_size``. Without a CUDA device, the CPU takes its place. Raises CheckpointError if the folder cannot be
    loaded, and ConfigError for an unknown device or batch size.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        prefill_chunk: int = 512,
        batch_tokens: int = 16_384,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.checkpoint = Path(checkpoint)
        self._batch_size = _parse_batch_size(batch_size, max_batch_size)
        self._device = _parse_device(device)
        self._model = checkpoints.load(self.checkpoint, device=self._device)
        self._tokenizer = load_tokenizer(self.checkpoint, model_vocab_size=self._model.config.vocab_size)
        self._prefill_chunk = prefill_chunk
        self._batch_tokens = batch_tokens

    # --- interface of lm-eval's TemplateLM

    @property
    def max_length(self) -> int:
        """The model's context length in tokens."""
        return self._model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which starts every training document."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token IDs, with BOS in front unless ``add_special_tokens`` is False."""
        return self._tokenizer.encode(string) if add_special_tokens is False else self._tokenizer.encode_prompt(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding yields it) of each continuation after its context.

        An empty context is BOS. Raises ConfigError for an empty continuation.
        """
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token IDs of a context, with BOS in front, and those of its continuation.

        The continuation is what encoding the joined text adds to the context's tokens. Where a token of the joined text
        reaches across the border, the continuation is encoded on its own. As in lm-eval, spaces at the end of a context
        belong to the continuation.
        """
        if not continuation:
            raise ConfigError(f"loglikelihood: {_describe(context, continuation)}: the continuation is empty")
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        context_ids, ids = self.tok_encode(stripped), self.tok_encode(stripped + continuation)
        if ids[: len(context_ids)] == context_ids:
            ids = ids[len(context_ids) :]
        else:
            ids = self._tokenizer.encode_inside(continuation)
        return context_ids, ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats.

        Texts longer than the context are scored in context-sized windows that predict every token once. Raises
        ConfigError for a text without tokens.
        """
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        window_requests: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            if text and not ids:
                raise ConfigError(f"loglikelihood_rolling: the tokenizer has no tokens for the text {text[:40]!r}")
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((("", text), *make_disjoint_window(pair)))
                window_requests.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (log_likelihood, _) in zip(window_requests, scores):
            totals[i] += log_likelihood
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding yields it) of each continuation after its context.

        Raises ConfigError for a pair longer than the model's context; truncation would change its score. Raises it for
        a continuation without tokens, whose score would be the best possible one.
        """
        # Keyed by the network's input, so that a context with several one-token continuations is processed once.
        targets: dict[Tokens, list[tuple[int, int, list[int]]]] = defaultdict(list)
        for i, (pair, context, continuation) in enumerate(requests):
            if not continuation:
                raise ConfigError(
                    f"loglikelihood: {_describe(*pair)}: the tokenizer has no tokens for the continuation"
                )
            inputs = (*context, *continuation)[:-1]
            self._check_length(len(inputs), "context and continuation")
            targets[inputs].append((i, len(context) - 1, continuation))

        totals = [0.0] * len(requests)
        greedy = [True] * len(requests)
        bar = _progress_bar(len(targets), "loglikelihood", disable_tqdm)
        for batch in self._batches(targets, key=len, tokens=len):
            ids = self._tensor(batch)
            score_start = min(first for inputs in batch for _, first, _ in targets[inputs])
            cache = Cache(self._model.config, len(batch), ids.shape[1], device=self._device)
            if score_start > 0:
                prefill(self._model, cache, ids[:, :score_start], self._prefill_chunk)
            for start in range(score_start, ids.shape[1], self._prefill_chunk):
                logits = self._model(ids[:, start : start + self._prefill_chunk], cache)
                end = start + logits.shape[1]
                for row, inputs in enumerate(batch):
                    for i, first, continuation in targets[inputs]:
                        low, high = max(first, start), min(first + len(continuation), end)
                        if low < high:
                            target = torch.tensor(continuation[low - first : high - first], device=self._device)
                            scores = logits[row, low - start : high - start].log_softmax(dim=-1)
                            totals[i] += scores.gather(1, target[:, None]).double().sum().item()
                            greedy[i] &= bool((self._most_likely(scores) == target).all())
            bar.update(len(batch))
        bar.close()
        results = list(zip(totals, greedy))
        for (pair, _, _), result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations of at most ``max_gen_toks`` tokens, cut before the first stop string or EOS.

        Raises ConfigError if prompt and continuation exceed the context, and for sampling.
        """
        results = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], dict[Tokens, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, request in enumerate(requests):
            text, arguments = request.args
            settings = normalize_gen_kwargs(arguments, default_max_gen_toks=256)
            if settings["do_sample"]:
                raise ConfigError("generation_kwargs: do_sample is not supported; decoding is greedy")
            prompt = tuple(self.tok_encode(text))
            max_new_tokens = settings["max_gen_toks"]
            description = f"a prompt of {count(len(prompt), 'token')} and its continuation"
            self._check_length(len(prompt) + max_new_tokens - 1, description)
            groups[max_new_tokens, tuple(settings["until"])][prompt].append(i)

        bar = _progress_bar(len(requests), "generate_until", disable_tqdm)
        for (max_new_tokens, until), indices in groups.items():
            chains = _prefix_chains(indices)
            for batch in self._batches(chains, key=_prompt_lengths, tokens=lambda chain: len(chain[-1])):
                for chain, texts in zip(batch, self._generate(batch, max_new_tokens, until)):
                    for prompt, text in zip(chain, texts):
                        for i in indices[prompt]:
                            results[i] = text
                            self.cache_hook.add_partial("generate_until", requests[i].args, text)
                            bar.update()
        bar.close()
        return results

    # --- decoding

    def _generate(self, chains: list[list[Tokens]], max_new_tokens: int, until: Sequence[str]) -> list[list[str]]:
        """Continue chains of prompts with equal lengths per position. Returns texts [chain][prompt]."""
        texts: list[list[str]] = [[] for _ in chains]
        cache = Cache(self._model.config, len(chains), len(chains[0][-1]) + max_new_tokens - 1, device=self._device)
        for turn in range(len(chains[0])):
            rest = self._tensor([chain[turn][cache.length :] for chain in chains])
            logits = prefill(self._model, cache, rest, self._prefill_chunk)
            # Decode on a fork, so that the next prompt extends this one alone. A single token needs no cache.
            fork = cache.fork() if max_new_tokens > 1 and turn + 1 < len(chains[0]) else cache
            prompts = [chain[turn] for chain in chains]
            for row, text in enumerate(self._decode(fork, logits, prompts, max_new_tokens, until)):
                texts[row].append(text)
            if fork is not cache:
                fork.release()  # before the next fork allocates as much
        return texts

    def _decode(
        self, cache: Cache, logits: Tensor, prompts: list[Tokens], max_new_tokens: int, until: Sequence[str]
    ) -> list[str]:
        """Continue B prompts greedily from the logits after them, [B, vocab]. Returns B texts."""
        stops = StopStrings(filter(None, until), self._tokenizer)
        streams = [GeneratedText(self._tokenizer, prompt, stops) for prompt in prompts]
        texts, ended = [""] * len(prompts), [False] * len(prompts)
        for step in range(max_new_tokens):
            next_ids = self._most_likely(logits)
            for row, token in enumerate(next_ids.tolist()):
                if ended[row]:
                    continue
                ends = token in self._tokenizer.stop_ids
                text, stopped = ("", False) if ends else streams[row].push(token)
                ended[row] = stopped or ends or step + 1 == max_new_tokens
                if ended[row] and not stopped:
                    text += streams[row].finish()[0]
                texts[row] += text
            if all(ended):
                break
            logits = self._model(next_ids[:, None], cache)[:, -1]
        return texts

    def _most_likely(self, scores: Tensor) -> Tensor:
        """Return the token ID with the highest of the scores [..., vocab]. Rows of the embedding beyond the tokenizer's
        IDs are padding."""
        return scores[..., : self._tokenizer.vocab_size].argmax(dim=-1)

    # --- batches

    def _batches(
        self, items: Iterable[Item], key: Callable[[Item], Hashable], tokens: Callable[[Item], int]
    ) -> Iterator[list[Item]]:
        """Yield batches of items with equal ``key``, each within ``batch_tokens`` tokens and ``batch_size`` items."""
        groups: dict[Hashable, list[Item]] = defaultdict(list)
        for item in items:
            groups[key(item)].append(item)
        for group in groups.values():
            size = min(self._batch_size, max(1, self._batch_tokens // max(1, tokens(group[0]))))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _check_length(self, tokens: int, description: str) -> None:
        if tokens > self.max_length:
            raise ConfigError(f"{description} need {tokens} positions, but the model's context has {self.max_length}")


def _parse_device(name: str | torch.device) -> torch.device:
    """Return a device; the CPU, with a warning, in place of a missing CUDA device, which is lm-eval's default."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: '{name}' is not a device of PyTorch") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        logging.getLogger("lm_eval").warning("device: '%s' is not available; using the CPU", name)
        return torch.device("cpu")
    return device


def _parse_batch_size(batch_size: int | str, limit: int | None) -> int:
    if str(batch_size).startswith("auto"):
        return sys.maxsize if limit is None else limit
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ConfigError(f"batch_size: expected a number of prompts or auto, found {quote(batch_size)}")
    return int(batch_size)


def _describe(context: str, continuation: str) -> str:
    return f"the context {context[-40:]!r} and the continuation {continuation[:40]!r}"


def _prefix_chains(prompts: Iterable[Tokens]) -> list[list[Tokens]]:
    """Arrange prompts in chains in which each prompt is a prefix of the next."""
    chains: list[list[Tokens]] = []
    for prompt in sorted(prompts):  # a prompt sorts before its extensions
        if chains and prompt[: len(chains[-1][-1])] == chains[-1][-1]:
            chains[-1].append(prompt)
        else:
            chains.append([prompt])
    return chains


def _prompt_lengths(chain: list[Tokens]) -> Tokens:
    return tuple(len(prompt) for prompt in chain)


def _progress_bar(total: int, title: str, disable: bool) -> tqdm:
    """Return a progress bar for terminals only; in a log file, every refresh would be a line."""
    return tqdm(total=total, desc=title, file=sys.__stderr__, disable=True if disable else None)
