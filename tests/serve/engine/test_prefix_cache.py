"""Kept prefixes: which lengths are kept, and which one a prompt continues from."""

import torch

from model.cache import Cache
from model.cache.pages import PagePool
from serve.engine.prefix_cache import KEPT_EVERY, PrefixCache


def prefix_cache(model, capacity=8, pages=64) -> tuple[PrefixCache, PagePool]:
    return PrefixCache(model.config.page_tokens, capacity), PagePool(model.config, pages)


def filled(model, pool: PagePool, tokens: list[int]) -> Cache:
    cache = Cache(model.config, 1, model.config.max_positions, pool=pool)
    with torch.inference_mode():
        model(torch.tensor([tokens]), cache, last_only=True)
    return cache


def test_the_last_boundary_and_the_branch_are_kept(byte_model) -> None:
    prefixes, _ = prefix_cache(byte_model)
    page = prefixes.page_tokens
    first = list(range(200)) * 2
    lengths = prefixes.boundaries(prefixes.digests(first[: 3 * page + 1]))
    assert list(lengths) == [3 * page]
    # The second prompt shares one page with the first.
    second = first[: page + 5] + [7] * (3 * page)
    assert list(prefixes.boundaries(prefixes.digests(second))) == [page, (len(second) - 1) // page * page]


def test_a_prompt_of_whole_pages_leaves_a_token_to_compute(byte_model) -> None:
    prefixes, _ = prefix_cache(byte_model)
    page = prefixes.page_tokens
    assert len(prefixes.digests([1] * page)) == 0
    assert len(prefixes.digests([1] * (page + 1))) == 1


def test_long_prompts_are_kept_at_intervals(byte_model) -> None:
    prefixes, _ = prefix_cache(byte_model)
    lengths = list(prefixes.boundaries(prefixes.digests([1] * (3 * KEPT_EVERY))))
    assert [length for length in lengths if length % KEPT_EVERY == 0] == [KEPT_EVERY, 2 * KEPT_EVERY]


def test_the_longest_prefix_is_found_and_equals_reading_the_prompt(byte_model) -> None:
    prefixes, pool = prefix_cache(byte_model)
    page = prefixes.page_tokens
    tokens = torch.randint(0, 250, (3 * page + 9,), generator=torch.Generator().manual_seed(0)).tolist()
    digests = prefixes.digests(tokens)
    for count in (1, 2):
        prefixes.keep(digests[count - 1], filled(byte_model, pool, tokens[: count * page]))
    found = prefixes.find(prefixes.digests(tokens))
    assert found is not None
    assert found.length == 2 * page
    found = found.fork()
    with torch.inference_mode():
        got = byte_model(torch.tensor([tokens[2 * page :]]), found, last_only=True)
        want = byte_model(torch.tensor([tokens]), last_only=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    other = [*tokens[:page], (tokens[page] + 1) % 250, *tokens[page + 1 :]]
    found = prefixes.find(prefixes.digests(other))
    assert found is not None
    assert found.length == page
    assert prefixes.find(prefixes.digests([(tokens[0] + 1) % 250, *tokens[1:]])) is None


def test_the_least_recently_used_prefix_is_dropped_and_its_pages_freed(byte_model) -> None:
    prefixes, pool = prefix_cache(byte_model, capacity=2)
    page = prefixes.page_tokens
    prompts = [[i] * (page + 1) for i in range(3)]
    keys = [prefixes.digests(prompt) for prompt in prompts]
    for prompt, digests in zip(prompts[:2], keys):
        prefixes.keep(digests[0], filled(byte_model, pool, prompt[:page]))
    assert prefixes.evictable_pages(pool) == 2
    prefixes.find(keys[0])
    prefixes.keep(keys[2][0], filled(byte_model, pool, prompts[2][:page]))
    assert len(prefixes) == 2
    assert prefixes.find(keys[1]) is None
    held = prefixes.find(keys[0])
    assert held is not None
    assert prefixes.evictable_pages(pool, spared=held) == 1
    held = held.fork()
    assert prefixes.evictable_pages(pool) == 1  # the other page is in use
    del held
    while len(prefixes):
        prefixes.evict()
    assert pool.free_pages == pool.pages
