"""The compare step on trained checkpoints."""

import shutil
import statistics

import pytest

from model import checkpoint
from model.errors import ConfigError
from model.transformer import Transformer
from pipelines.recipe.loading import with_overrides
from pipelines.steps import compare
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.training import compute_dtype
from pipelines.training.build import build_trainer, folder_batches


class Keep:
    """Reporter that writes the last checkpoint."""

    def __init__(self, folder):
        self.folder = folder

    def log(self, step, metrics):
        pass

    def tell(self, step, what):
        pass

    def report(self, step, metrics, write):
        if write is not None:
            self.folder.mkdir(exist_ok=True)
            write(self.folder)


@pytest.fixture(scope="module")
def pairs(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for seed in (0, 1):
        for qat in (True, False):
            recipe = with_overrides(
                prepared, {"run.seed": seed, "model.qat": qat, "train.checkpoint_every": 100, "model.index_topk": 2}
            )
            build_trainer(recipe, folder_batches(recipe), Keep(folder / f"{qat}-{seed}")).run()
    return with_overrides(
        prepared,
        {"run.name": "compared", "model.index_topk": 2,
         "compare.qat": [str(folder / f"True-{seed}") for seed in (0, 1)],
         "compare.plain": [str(folder / f"False-{seed}") for seed in (0, 1)]},
    )  # fmt: skip


def test_pairs_are_scored_in_four_ways(pairs, capsys):
    found = compare.run(pairs)
    exact, after, with_qat, bf16_keys = found.values()
    assert all(len(values) == 2 for scores in found.values() for values in scores.values())
    assert exact["text_loss"] != after["text_loss"] and with_qat["recall_at_k"] != bf16_keys["recall_at_k"]
    for scores in found.values():
        assert all(0 < plain <= of_best <= 1 + 1e-6 for plain, of_best in
                   zip(scores["recall_at_k"], scores["recall_at_k_of_best"]))  # fmt: skip
    (run,) = open_tracking(pairs).client.search_runs(
        [open_tracking(pairs).experiment_id], filter_string="tags.kind = 'compare'"
    )
    logged = run.data.metrics
    assert logged["compare/with_QAT_quantised/text_loss"] == statistics.fmean(with_qat["text_loss"])
    assert logged["compare/with_QAT_quantised/text_loss_spread"] == statistics.stdev(with_qat["text_loss"])
    assert "without QAT, quantized after" in capsys.readouterr().out


def test_what_is_no_pair_is_refused(pairs):
    with pytest.raises(ConfigError, match=r"found 2 in compare\.qat and 1 in compare\.plain"):
        compare.run(with_overrides(pairs, {"compare.plain": [str(pairs.compare.plain[0])]}))
    with pytest.raises(ConfigError, match=r"compare\.qat: .*False-0 was trained without QAT"):
        swapped = {
            "compare.qat": list(map(str, pairs.compare.plain)),
            "compare.plain": list(map(str, pairs.compare.qat)),
        }
        compare.run(with_overrides(pairs, swapped))


def test_a_pair_has_the_same_data_types(pairs, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(pairs.compare.qat[0], narrow)
    compute_dtype.write(narrow, compute_dtype.BF16)
    with pytest.raises(ConfigError, match=r"narrow and .* were trained with products of different data types"):
        compare.run(with_overrides(pairs, {"compare.qat": [str(narrow), str(pairs.compare.qat[1])]}))


def test_networks_of_another_vocabulary_than_the_data_are_refused(pairs, tmp_path):
    config = checkpoint.load_config(pairs.compare.qat[0]).replace(vocab_size=77)
    for qat in (True, False):
        checkpoint.save(Transformer(config.replace(qat=qat)), tmp_path / str(qat))
        compute_dtype.write(tmp_path / str(qat), compute_dtype.FLOAT32)
    changes = {"compare.qat": [str(tmp_path / "True")], "compare.plain": [str(tmp_path / "False")]}
    with pytest.raises(ConfigError, match=r"compare\.qat: .*True has a vocabulary of 77, .* was prepared for"):
        compare.run(with_overrides(pairs, changes))
