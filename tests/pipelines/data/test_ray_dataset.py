"""Rows and batches of a Ray dataset."""

import threading
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
from shard_helpers import LENGTH, as_bytes, first_shard, resumes, rows_of, single

from pipelines.data.batches import train_batches
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest
from pipelines.data.packing import cut_rows
from pipelines.data.ray_dataset import train_dataset


def test_ray_reads_the_same_rows_shard_by_shard(folder, ray_cluster):
    columns = train_dataset(folder, LENGTH, seed=1).iter_batches(batch_size=None, batch_format="numpy")
    found = [row for batch in columns for row in split_rows(batch)]
    expected = as_bytes(local_rows(folder, "train", LENGTH))
    assert Counter(found) == Counter(expected)
    assert found != expected  # the seed shuffles the shards
    size = len(cut_rows(pq.read_table(first_shard(folder)), LENGTH)["tokens"])
    start = found.index(expected[0])
    assert found[start : start + size] == expected[:size]


def split_rows(columns: dict[str, np.ndarray]) -> list[bytes]:
    assert columns["tokens"].dtype == columns["positions"].dtype == np.int32
    assert columns["target_kind"].dtype == np.uint8
    return as_bytes(single(columns))


def test_a_worker_s_stream_resumes_where_it_stopped(folder, ray_cluster):
    per_epoch = sum(read_manifest(folder).splits["train"].rows.values()) // 64
    shard = train_dataset(folder, LENGTH).streaming_split(1, equal=True)[0]

    def open_stream(epoch: int, skip: int):
        return train_batches(shard, LENGTH, 64, seed=7, epoch=epoch, skip=skip)

    resumes(open_stream, per_epoch + 3, (per_epoch + 1,))


def test_two_workers_share_an_epoch(folder, ray_cluster):
    everything = Counter(as_bytes(local_rows(folder, "train", LENGTH)))
    per_worker = everything.total() // 2 // 8
    rows: list[list[bytes]] = [[], []]

    def work(rank: int, shard) -> None:
        stream = train_batches(shard, LENGTH, 8)
        for _ in range(per_worker):
            rows[rank] += rows_of(next(stream))
        assert stream.epoch == 0
        stream.close()

    shards = train_dataset(folder, LENGTH).streaming_split(2, equal=True)
    threads = [threading.Thread(target=work, args=item) for item in enumerate(shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(rows[0]) == len(rows[1]) == per_worker * 8
    assert not Counter(rows[0] + rows[1]) - everything
