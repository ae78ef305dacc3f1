"""Reading of rows without Ray."""

from collections import Counter

from shard_helpers import LENGTH, as_bytes

from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest


def test_local_rows_select_limit_and_shuffle(folder):
    manifest = read_manifest(folder)
    assert len(manifest.splits["train"].shards) > 2
    everything = as_bytes(local_rows(folder, "train", LENGTH))
    assert len(everything) == sum(manifest.splits["train"].rows.values())
    for kind, count in manifest.splits["train"].rows.items():
        assert sum(1 for _ in local_rows(folder, "train", LENGTH, kinds=[kind])) == count
    assert as_bytes(local_rows(folder, "train", LENGTH, limit=10)) == everything[:10]
    shuffled = as_bytes(local_rows(folder, "train", LENGTH, seed=1))
    assert shuffled != everything and Counter(shuffled) == Counter(everything)
    assert as_bytes(local_rows(folder, "train", LENGTH, seed=1)) == shuffled
    assert as_bytes(local_rows(folder, "train", LENGTH, seed=2)) != shuffled
