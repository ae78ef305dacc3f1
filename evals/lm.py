"""A checkpoint as a language model of lm-eval: every answer comes out of the compressed cache.

Prompts are read into :class:`model.cache.Cache` in pieces. Prompts of equal length go through the network together,
and a prompt that begins another one (the questions asked of one document) is read once for both.
"""

from __future__ import annotations

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

Tokens = tuple[int, ...]
Item = TypeVar("Item")


class CheckpointLM(TemplateLM):
    """lm-eval's ``LM`` around the checkpoint in a folder; decoding is greedy.

    ``chunk`` tokens of each prompt are read at a time; a batch holds as many prompts as stay within ``batch_tokens``
    tokens, and at least one. Raises CheckpointError when the folder cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        chunk: int = 512,
        batch_tokens: int = 16_384,
    ):
        super().__init__()
        self.checkpoint = Path(checkpoint)
        self._device = torch.device(device)
        self._model = checkpoints.load(self.checkpoint, device=self._device)
        self._tokenizer = load_tokenizer(self.checkpoint)
        self._chunk = chunk
        self._batch_tokens = batch_tokens

    # --- what lm-eval asks of a model

    @property
    def max_length(self) -> int:
        """Tokens that fit the model's context."""
        return self._model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Documents begin with BOS in training, so an empty context is BOS too."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with BOS in front unless ``add_special_tokens`` is False."""
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self._tokenizer.bos_id, *ids]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts in nats. What exceeds the context is scored in windows, each as long as
        the context, in which every token is predicted once."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((("", text), *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[owner] += log_likelihood
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
        """(log-likelihood in nats, is it what greedy decoding writes) of each continuation after its context.

        Raises ConfigError for a pair that does not fit the context: a truncated one would be scored on other terms.
        """
        # Keyed by what the network reads: contexts scored for several one-token continuations are read once.
        wanted: dict[Tokens, list[tuple[int, int, list[int]]]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            inputs = (*context, *continuation)[:-1]
            self._check_length(len(inputs), "context and continuation")
            wanted[inputs].append((i, len(context) - 1, continuation))

        totals = [0.0] * len(requests)
        greedy = [True] * len(requests)
        bar = _bar(len(wanted), "loglikelihood", disable_tqdm)
        for batch in self._batches(wanted, key=len, tokens=len):
            ids = self._tensor(batch)
            begin = min(first for inputs in batch for _, first, _ in wanted[inputs])
            cache = Cache(self._model.config, len(batch), ids.shape[1], device=self._device)
            if begin > 0:
                prefill(self._model, cache, ids[:, :begin], self._chunk)
            for start in range(begin, ids.shape[1], self._chunk):
                logits = self._model(ids[:, start : start + self._chunk], cache)
                end = start + logits.shape[1]
                for row, inputs in enumerate(batch):
                    for i, first, continuation in wanted[inputs]:
                        low, high = max(first, start), min(first + len(continuation), end)
                        if low < high:
                            target = torch.tensor(continuation[low - first : high - first], device=self._device)
                            scores = logits[row, low - start : high - start].log_softmax(dim=-1)
                            totals[i] += scores.gather(1, target[:, None]).double().sum().item()
                            greedy[i] &= bool((scores.argmax(dim=-1) == target).all())
            bar.update(len(batch))
        bar.close()
        results = list(zip(totals, greedy))
        for (pair, _, _), result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop string or EOS, of at most ``max_gen_toks`` tokens.

        Raises ConfigError for a prompt that leaves no room for them, and for sampling.
        """
        results = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], dict[Tokens, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, request in enumerate(requests):
            text, arguments = request.args
            settings = normalize_gen_kwargs(arguments, default_max_gen_toks=256)
            if settings["do_sample"]:
                raise ConfigError("generation_kwargs: do_sample is set, but checkpoints are evaluated greedily")
            prompt = tuple(self.tok_encode(text))
            limit = settings["max_gen_toks"]
            self._check_length(len(prompt) + limit - 1, f"a prompt of {len(prompt)} tokens and its answer")
            groups[limit, tuple(settings["until"])][prompt].append(i)

        bar = _bar(len(requests), "generate_until", disable_tqdm)
        for (limit, until), owners in groups.items():
            chains = _chains(owners)
            for batch in self._batches(chains, key=_shape, tokens=lambda chain: len(chain[-1])):
                for chain, texts in zip(batch, self._generate(batch, limit, until)):
                    for prompt, text in zip(chain, texts):
                        for i in owners[prompt]:
                            results[i] = text
                            self.cache_hook.add_partial("generate_until", requests[i].args, text)
                            bar.update()
        bar.close()
        return results

    # --- decoding

    def _generate(self, chains: list[list[Tokens]], limit: int, until: Sequence[str]) -> list[list[str]]:
        """The answers to chains of prompts whose lengths are alike: [chain][prompt] texts."""
        answers: list[list[str]] = [[] for _ in chains]
        cache = Cache(self._model.config, len(chains), len(chains[0][-1]) + limit - 1, device=self._device)
        for turn in range(len(chains[0])):
            rest = self._tensor([chain[turn][cache.length :] for chain in chains])
            logits = prefill(self._model, cache, rest, self._chunk)
            # The answer must not enter what the next prompt goes on from; one token is known without writing it.
            answering = cache.fork() if limit > 1 and turn + 1 < len(chains[0]) else cache
            for row, text in enumerate(self._answer(answering, logits, limit, until)):
                answers[row].append(text)
            if answering is not cache:
                answering.release()  # before the next fork asks for as much
        return answers

    def _answer(self, cache: Cache, logits: Tensor, limit: int, until: Sequence[str]) -> list[str]:
        """Go on greedily from ``logits`` [B, vocab]: B texts."""
        ids: list[list[int]] = [[] for _ in range(len(logits))]
        texts: list[str | None] = [None] * len(logits)
        for step in range(limit):
            chosen = logits.argmax(dim=-1)
            for row, token in enumerate(chosen.tolist()):
                if texts[row] is not None:
                    continue
                if token != self.eot_token_id:
                    ids[row].append(token)
                text = self._tokenizer.decode(ids[row])
                stops = [place for stop in until if stop and (place := text.find(stop)) >= 0]
                if stops or token == self.eot_token_id or step + 1 == limit:
                    texts[row] = text[: min(stops, default=None)]
            if all(text is not None for text in texts):
                break
            logits = self._model(chosen[:, None], cache)[:, -1]
        return [text or "" for text in texts]

    # --- batches

    def _batches(
        self, items: Iterable[Item], key: Callable[[Item], Hashable], tokens: Callable[[Item], int]
    ) -> Iterator[list[Item]]:
        """Groups of items with equal ``key``, each within ``batch_tokens``."""
        groups: dict[Hashable, list[Item]] = defaultdict(list)
        for item in items:
            groups[key(item)].append(item)
        for group in groups.values():
            size = max(1, self._batch_tokens // max(1, tokens(group[0])))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.max_length:
            raise ConfigError(f"{what} need {tokens} positions, the model's context has {self.max_length}")


def _chains(prompts: Iterable[Tokens]) -> list[list[Tokens]]:
    """Arrange prompts so that each begins the next one of its chain. Sorted, a prompt comes before its extensions."""
    chains: list[list[Tokens]] = []
    for prompt in sorted(prompts):
        if chains and prompt[: len(chains[-1][-1])] == chains[-1][-1]:
            chains[-1].append(prompt)
        else:
            chains.append([prompt])
    return chains


def _shape(chain: list[Tokens]) -> Tokens:
    return tuple(len(prompt) for prompt in chain)


def _bar(total: int, title: str, disable: bool) -> tqdm:
    """A progress bar on a terminal only; in a log file every refresh would be a line."""
    return tqdm(total=total, desc=title, file=sys.__stderr__, disable=True if disable else None)
