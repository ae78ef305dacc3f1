import pytest

from model.batching import split_by_size


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([], []),
        ([3], [[3]]),
        ([4, 6, 1], [[4, 6], [1]]),
        ([11, 2, 30, 30], [[11], [2], [30], [30]]),
        ([0, 10, 0, 0, 1], [[0, 10, 0, 0], [1]]),
    ],
)
def test_batches_are_as_large_as_the_limit_allows(sizes, batches):
    assert [sizes[batch] for batch in split_by_size(sizes, 10)] == batches
