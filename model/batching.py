"""Division of a list into batches of limited size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def split_by_size(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Yield slices of consecutive items whose ``sizes`` add up to at most ``limit``. A larger item is a slice of its
    own."""
    begin = total = 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > limit:
            yield slice(begin, i)
            begin, total = i, 0
        total += size
    if sizes:
        yield slice(begin, len(sizes))
