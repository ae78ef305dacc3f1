"""Step-by-step scheduling of sequences."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from model.cache import Cache
from model.decode_graphs import DecodeGraphs
from model.errors import FiftyfoldError
from model.transformer import Transformer
from serve.engine.config import EngineConfig
from serve.engine.decode_batch import DecodeBatch
from serve.engine.errors import EngineError, RequestAbortedError, RequestTimeoutError
from serve.engine.logprobs import TokenLogprob, token_logprobs
from serve.engine.memory import CacheMemory
from serve.engine.prefill_budget import PrefillBudget
from serve.engine.sampler import sample_tokens
from serve.engine.sequence import Delta, Sequence
from serve.engine.speculation import Drafter
from serve.engine.stats import EngineStats

logger = logging.getLogger(__name__)

Results = list[tuple[Sequence, Delta]]


def _decode_graphs(model: Transformer, config: EngineConfig) -> DecodeGraphs | None:
    """Return recorded steps if the configuration permits them and the network supports them."""
    if config.speculative_tokens:
        if next(model.parameters()).is_cuda:
            logger.info("decode steps are not recorded: kernels that read drafted tokens synchronize with the CPU")
        return None
    return DecodeGraphs.if_supported(model, config.max_active_requests, config.cuda_graphs)


class Scheduler:
    """Advance sequences step by step, in order of arrival. Not thread-safe.

    A step decodes one token of all sequences whose prompt has been read (or more with speculative decoding), in one
    forward pass, and reads a number of prompt tokens that :class:`PrefillBudget` allows. A sequence waits until the
    pool has pages for its prompt. If the pool is full when a running sequence needs a page, the newest sequence loses
    its cache and waits to be read again.

    Only IDs below ``vocab_size`` are sampled and offered as alternatives: an embedding may have more rows than there
    are tokens. None allows all of the model's.
    """

    def __init__(self, model: Transformer, config: EngineConfig, vocab_size: int | None = None):
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        self.memory = CacheMemory(model.config, config, self.device)
        self.stats = EngineStats()
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.batch = DecodeBatch()
        self._vocab_size = vocab_size
        count = config.speculative_tokens
        self.drafter = Drafter(model, count, vocab_size) if count else None
        self.graphs = _decode_graphs(model, config)
        self.model_label = "the model"
        """Name of the model in errors and logs."""
        self._prefill_budget = PrefillBudget(config.prefill_chunk, config.prefill_share)
        self._any_aborted = False
        self._first_deadline = math.inf
        """No unfinished sequence has an earlier deadline."""

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.prefilling or len(self.batch))

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence, if it is unfinished, at the beginning of the next step. May be called from any thread."""
        sequence.aborted = True
        self._any_aborted = True

    def abort_all(self) -> None:
        """Drop all sequences at the beginning of the next step."""
        for sequence in (*self.waiting, *self.prefilling, *self.batch.sequences):
            self.abort(sequence)

    @torch.inference_mode()
    def step(self, arrivals: Iterable[Sequence] = ()) -> Results:
        """Admit ``arrivals``, run one step, and return its output per sequence."""
        for sequence in arrivals:
            self.waiting.append(sequence)
            self._first_deadline = min(self._first_deadline, sequence.deadline)
            if sequence.aborted:  # not `|=`, which could lose an abort by another thread
                self._any_aborted = True
        results = self._drop_aborted_and_expired()
        self._admit()
        results += self._decode()
        results += self._prefill()
        return results

    # --- admission

    def _admit(self) -> None:
        """Give waiting sequences a cache while there is room, in order."""
        while self.waiting and len(self.prefilling) + len(self.batch) < self.config.max_active_requests:
            sequence, prefixes = self.waiting[0], self.memory.prefixes
            if sequence.page_digests is None:
                sequence.page_digests = prefixes.digests(sequence.tokens)
            kept = self._find_prefix(sequence)
            found = kept.length if kept is not None else 0
            needed = self.memory.pages_for(sequence.reserved_tokens) - self.memory.pages_for(found)
            if not self.memory.make_room(self._promised_pages() + needed, spared=kept):
                return
            sequence.start(kept.fork() if kept is not None else self.memory.new_cache())
            sequence.boundaries = prefixes.boundaries(sequence.page_digests)
            self.prefilling.append(self.waiting.popleft())

    def _find_prefix(self, sequence: Sequence) -> Cache | None:
        """Return the longest kept prefix. Log-probabilities of the prompt need a forward pass over all of it."""
        if sequence.needs_prompt_logprobs:
            return None
        return self.memory.prefixes.find(sequence.page_digests or [])

    def _promised_pages(self) -> int:
        """Return the number of pages that admitted prompts have yet to take."""
        pages_for = self.memory.pages_for
        return sum(pages_for(s.reserved_tokens) - pages_for(s.computed) for s in self.prefilling)

    # --- decoding

    def _decode(self) -> Results:
        drafts = self._make_room_for_tokens()
        sequences = list(self.batch.sequences)
        if not sequences:
            return []
        started = time.perf_counter()
        try:
            logits = self.batch.forward(self.model, drafts, self.graphs)
            self.stats.model_seconds += time.perf_counter() - started
            results = self._sample_drafted(logits, sequences)
        except Exception as error:
            results = self._fail(sequences, error)
        self._finish([sequence for sequence, delta in results if delta.final])
        if self.drafter is not None:
            results = self._draft(self.drafter, results)
        seconds = time.perf_counter() - started
        self._prefill_budget.decoded(seconds)
        self.stats.decode_steps += 1
        self.stats.decoded_tokens += sum(delta.tokens for _, delta in results)
        self.stats.decode_seconds += seconds
        return results

    def _draft(self, drafter: Drafter, results: Results) -> Results:
        """Draft the next tokens of the sequences in the batch. Return the results of the step, some of which may have
        become errors."""
        started = time.perf_counter()
        sequences = list(self.batch.sequences)
        try:
            if self.batch.cache is not None and self.batch.hidden is not None:
                drafter.draft(sequences, self.batch.cache, self.batch.hidden)
        except Exception as error:
            self._finish(sequences)
            return [result for result in results if result[1].final] + self._fail(sequences, error)
        finally:
            self.stats.model_seconds += time.perf_counter() - started
        return results

    def _fail(self, sequences: list[Sequence], error: Exception) -> Results:
        logger.error("%s failed on %d completions", self.model_label, len(sequences), exc_info=error)
        return [(sequence, self._failure(error)) for sequence in sequences]

    def _failure(self, error: Exception) -> Delta:
        return Delta(error=EngineError(f"{self.model_label} failed on this request ({type(error).__name__})"))

    def _not_finite(self) -> Delta:
        return Delta(error=EngineError(f"{self.model_label} computed logits that are not finite"))

    def _usable_drafts(self) -> int:
        """Return the number of drafts per sequence: within the context of every sequence in the batch, and no more than
        the longest remaining completion needs."""
        if self.drafter is None or self.batch.cache is None:
            return 0
        room = self.batch.cache.max_tokens - max(self.batch.cache.lengths) - 1
        wanted = max(s.params.max_tokens - s.completion_tokens - 1 for s in self.batch.sequences)
        return min(self.drafter.count, room, wanted)

    def _make_room_for_tokens(self) -> int:
        """Make room for one more token of every sequence in the batch, preempting the newest sequences if necessary.
        Return the number of drafts to check in this step; drafts preempt no sequence."""
        drafts = self._usable_drafts()
        if drafts and self._make_room(1 + drafts):
            return drafts
        while self.batch.cache is not None and not self._make_room(1):
            newest = self.prefilling.pop() if self.prefilling else self.batch.sequences[-1]
            self.batch.remove([newest])
            newest.drop_cache()
            self.waiting.appendleft(newest)
            self.stats.preemptions += 1
        return 0

    def _make_room(self, tokens: int) -> bool:
        """Return whether ``tokens`` more tokens of every sequence in the batch fit, and free kept prefixes for them."""
        assert self.batch.cache is not None
        return self.memory.make_room(self._promised_pages() + self.batch.cache.missing_pages(tokens))

    def _sample_drafted(self, logits: Tensor, sequences: list[Sequence]) -> Results:
        """Sample from logits [B, 1 + drafts, vocab] of each sequence's last token and drafts. A sequence goes on to its
        next draft as long as its samples equal the drafts."""
        drafts = logits.shape[1] - 1
        if not drafts:
            return self._sample(logits[:, 0], sequences)
        self.stats.drafted_tokens += drafts * len(sequences)
        row_of = {id(sequence): row for row, sequence in enumerate(sequences)}
        outputs: list[list[Delta]] = [[] for _ in sequences]
        accepted = sequences
        for index in range(1 + drafts):
            rows = [row_of[id(sequence)] for sequence in accepted]
            sampled = self._sample(logits[rows, index], accepted)
            for sequence, delta in sampled:
                outputs[row_of[id(sequence)]].append(delta)
            if index == drafts:
                break
            right = [(s, delta) for s, delta in sampled if delta.error is None and s.tokens[-1] == s.drafts[index]]
            self.stats.accepted_tokens += len(right)
            accepted = [sequence for sequence, delta in right if not delta.final]
            if not accepted:
                break
        return [(sequence, Delta.join(deltas)) for sequence, deltas in zip(sequences, outputs)]

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> Results:
        """Sample a token of every sequence from logits [B, vocab]. Non-finite logits fail only their sequence."""
        tokens = sample_tokens(logits[:, : self._vocab_size], [sequence.sampler for sequence in sequences])
        records: list[TokenLogprob | None] = [None] * len(sequences)
        wanting = [i for i, one in enumerate(sequences) if one.params.logprobs is not None and tokens[i] >= 0]
        if wanting:
            rows = logits if len(wanting) == len(sequences) else logits[wanting]
            top_ns = [sequences[i].params.logprobs or 0 for i in wanting]
            found = token_logprobs(rows, [tokens[i] for i in wanting], top_ns, self._vocab_size)
            for i, record in zip(wanting, found):
                records[i] = record
        return [
            (sequence, sequence.advance(token, record) if token >= 0 else self._not_finite())
            for sequence, token, record in zip(sequences, tokens, records)
        ]

    # --- reading prompts

    def _prefill(self) -> Results:
        """Read prompts in order, as far as the budget allows."""
        results: Results = []
        finished: list[Sequence] = []
        decoding = bool(len(self.batch))
        left = self.config.prefill_chunk
        for sequence in self.prefilling:
            if left <= 0:
                break
            # Sequences admitted together, such as the completions of one prompt, continue from what the first has read.
            if not sequence.computed and (kept := self._find_prefix(sequence)) is not None:
                sequence.start(kept.fork())
            while left > 0 and not sequence.prefill_done:
                count = self._prefill_budget.tokens(min(left, len(sequence.tokens) - sequence.computed), decoding)
                if not count:
                    left = 0
                    break
                # A kept prefix needs the state at its end.
                ends = [end for end in sequence.boundaries if end > sequence.computed]
                count = min([count, *(end - sequence.computed for end in ends)])
                delta = self._read(sequence, count, decoding)
                left -= count
                if delta is not None:
                    results.append((sequence, delta))
                    finished.append(sequence)
                    break
        if finished:
            self.prefilling = [s for s in self.prefilling if s not in finished]
            self._finish([sequence for sequence, delta in results if delta.final])
            self.batch.add([sequence for sequence, delta in results if not delta.final])
        return results

    def _read(self, sequence: Sequence, count: int, decoding: bool) -> Delta | None:
        """Read the next ``count`` tokens. Return the first output if they are the last; an error ends this sequence."""
        started = time.perf_counter()
        try:
            ids = torch.tensor([sequence.tokens[sequence.computed : sequence.computed + count]], device=self.device)
            assert sequence.cache is not None
            hidden = self.model.read(ids, sequence.cache)
            # The output head runs over the whole chunk only for the prompt's log-probabilities.
            logits = self.model.logits(hidden if sequence.needs_prompt_logprobs else hidden[:, -1:])[0]
            sequence.computed += count
            if self.drafter is not None and not sequence.prefill_done:
                self.drafter.read(sequence, hidden)
            if (digest := sequence.boundaries.get(sequence.computed)) is not None:
                self.memory.prefixes.keep(digest, sequence.cache)
            if sequence.needs_prompt_logprobs:
                sequence.add_prompt_logprobs(logits)
            if not sequence.prefill_done:
                return None
            if sequence.params.max_tokens == 0:
                return sequence.finish_without_tokens()
            [(_, delta)] = self._sample(logits[-1:], [sequence])
            if self.drafter is not None and not delta.final:
                self.drafter.draft([sequence], sequence.cache, hidden)
            return delta
        except Exception as error:
            logger.exception("%s failed on a prompt", self.model_label)
            return self._failure(error)
        finally:
            seconds = time.perf_counter() - started
            self._prefill_budget.read(count, seconds, decoding)
            self.stats.prefill_tokens += count
            self.stats.prefill_seconds += seconds

    # --- ends

    def _finish(self, sequences: list[Sequence]) -> None:
        """Record the size of the caches and free them."""
        if not sequences:
            return
        for sequence in sequences:
            sequence.cache_nbytes = self.memory.cache_bytes(max(1, len(sequence.tokens) - 1))
            sequence.cache = None
        self.batch.remove(sequences)

    def _drop_aborted_and_expired(self) -> Results:
        now = time.monotonic()
        if not self._any_aborted and now <= self._first_deadline:
            return []
        self._any_aborted = False  # before the loop below: another thread may abort a sequence during it
        unfinished = [*self.prefilling, *self.batch.sequences, *self.waiting]
        dropped = [s for s in unfinished if s.aborted or now > s.deadline]
        self._first_deadline = min((s.deadline for s in unfinished if now <= s.deadline), default=math.inf)
        if not dropped:
            return []
        ids = {id(sequence) for sequence in dropped}
        self.prefilling = [sequence for sequence in self.prefilling if id(sequence) not in ids]
        self.waiting = deque(sequence for sequence in self.waiting if id(sequence) not in ids)
        self._finish(dropped)
        return [(sequence, Delta(error=self._reason(sequence))) for sequence in dropped]

    def _reason(self, sequence: Sequence) -> FiftyfoldError:
        if sequence.aborted:
            return RequestAbortedError("the request was aborted")
        seconds = self.config.request_timeout_seconds
        return RequestTimeoutError(f"the request did not finish within {seconds:g} seconds (request_timeout_seconds)")
