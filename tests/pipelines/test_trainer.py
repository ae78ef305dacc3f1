"""The training loop itself, in plain torch processes."""

import math
import os
import socket

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from model.config import CACHE_FORMATS
from model.errors import CheckpointError, ConfigError, FiftyfoldError
from pipelines.config import recipe_from_dict, with_overrides
from pipelines.data import SHARD_SCHEMA, batches, cut_rows, train_batches
from pipelines.train import build_trainer
from pipelines.trainer import check_stages, count_answers

EXACT = {**{f"model.{name}": "fp32" for name in CACHE_FORMATS}, "model.qat": False}
"""Nothing is rounded anywhere."""


class Record:
    """A reporter that remembers, and writes checkpoints into numbered folders of ``keep``."""

    def __init__(self, keep=None):
        self.keep, self.logged, self.reported = keep, [], []

    def log(self, step, metrics):
        self.logged.append((step, metrics))

    def report(self, step, metrics, write):
        self.reported.append((step, metrics))
        if write is not None and self.keep is not None:
            (self.keep / str(step)).mkdir(parents=True)
            write(self.keep / str(step))


def trainer_for(recipe, record, rank=0, world=1):
    rows = recipe.train.batch_rows // world
    length, seed = recipe.data.sequence_length, recipe.data.seed

    def batches(epoch, skip):
        whole = train_batches(recipe.data_folder, length, rows * world, seed, epoch, skip)
        return whole if world == 1 else Share(whole, rank, rows)

    return build_trainer(recipe, batches, record, rank, world)


class Share:
    """One rank's rows of every batch."""

    def __init__(self, whole, rank, rows):
        self.whole, self.rows = whole, slice(rank * rows, (rank + 1) * rows)

    def __next__(self):
        return {k: v[self.rows] for k, v in next(self.whole).items()}

    @property
    def epoch(self):
        return self.whole.epoch

    @property
    def batch(self):
        return self.whole.batch

    def close(self):
        self.whole.close()


def test_loss_falls_and_everything_is_reported(prepared):
    recipe = with_overrides(
        prepared, {"train.stages": [{"attention": "dense", "steps": 25}, {"attention": "sparse", "steps": 5}]}
    )
    record = Record()
    trainer_for(recipe, record).run()
    losses = [m["train/loss"] for _, m in record.logged]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    for name in (
        "train/indexer_kl",
        "train/grad_norm",
        "train/learning_rate/muon",
        "train/step_seconds",
        "train/balance",
    ):
        assert all(math.isfinite(m[name]) for _, m in record.logged), name
    _, last = record.reported[-1]
    for name in ("loss", "text_loss", "recall", "needle_recall", "indexer_kl", "recall_at_k", "recall_at_k_of_best"):
        assert math.isfinite(last[f"validation/{name}"]), name


def test_indexer_warmup_moves_the_indexer_alone(prepared):
    stages = [{"attention": "indexer_warmup", "steps": 2}]
    record = Record()
    trainer = trainer_for(with_overrides(prepared, {"train.stages": stages, "model.mtp_layers": 1}), record)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.run()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == (".indexer." not in name), name
    assert "train/mtp_loss" not in record.logged[0][1]


# --- packed documents


def packed_and_alone(length):
    """The same documents as a batch of packed rows and as a batch with a row for each."""
    rng = np.random.default_rng(0)
    documents = [
        {
            "document_id": str(i),
            "piece": 0,
            "source": "",
            "kind": kind,
            "tokens": rng.integers(0, 258, size).tolist(),
            "answer_starts": [size // 2] if kind == "mqar" else [],
            "answer_ends": [size // 2 + 2] if kind == "mqar" else [],
        }
        for i, (kind, size) in enumerate([("text", n) for n in (2, 5, 17, 40, 97, 30, 3, 61, 20)] + [("mqar", 33)] * 3)
    ]
    table = pa.Table.from_pylist(documents, schema=SHARD_SCHEMA)
    for packing in (True, False):
        rows = cut_rows(table, length, packing)
        count = len(rows["tokens"])
        yield next(batches(({k: v[i] for k, v in rows.items()} for i in range(count)), count))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_packed_documents_train_as_each_alone(prepared, attention):
    recipe = with_overrides(
        prepared,
        {**EXACT, "model.mtp_layers": 1, "model.index_topk": 3,
         "train.stages": [{"attention": attention, "steps": 1}], "train.answer_loss_weight": 3.0,
         "train.context_loss_weight": 0.5, "train.balance_loss_weight": 0.0, "train.grad_clip": 1e6},
    )  # fmt: skip
    packed, alone = packed_and_alone(recipe.data.sequence_length)
    assert len(packed["tokens"]) < len(alone["tokens"]) / 2
    trainers = [trainer_for(recipe, Record()) for _ in range(2)]
    one, two = (t._update(batch, t.stage_at(0)) for t, batch in zip(trainers, (packed, alone)))
    for name in ("train/loss", "train/mtp_loss"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=0)
    for (name, p), q in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_validation_masks_documents_too(prepared):
    recipe = with_overrides(prepared, {"model.mtp_layers": 1, **EXACT})
    trainer = trainer_for(recipe, Record())
    measured = []
    for batch in packed_and_alone(recipe.data.sequence_length):
        trainer._validation = {"text": [batch], "mqar": [batch]}
        measured.append(trainer.validate())
    assert measured[0]["validation/recall"] == measured[1]["validation/recall"]
    for name in ("text_loss", "answer_loss", "loss", "mtp_loss"):
        assert measured[0][f"validation/{name}"] == pytest.approx(measured[1][f"validation/{name}"], rel=1e-5), name


# --- multi-token prediction


def test_the_mtp_loss_falls_and_is_reported(prepared):
    recipe = with_overrides(prepared, {"model.mtp_layers": 1, "train.stages": [{"attention": "dense", "steps": 25}]})
    record = Record()
    trainer = trainer_for(recipe, record)
    before = trainer.validate()["validation/mtp_loss"]
    trainer.run()
    losses = [m["train/mtp_loss"] for _, m in record.logged]
    assert len(losses) == 25 and losses[-1] < losses[0] - 1
    assert record.reported[-1][1]["validation/mtp_loss"] < before - 1


def test_the_mtp_loss_weighs_less_once_the_learning_rate_falls(prepared):
    recipe = with_overrides(
        prepared,
        {"model.mtp_layers": 1, "train.stages": [{"attention": "dense", "steps": 10}], "train.warmup_steps": 0,
         "train.balance_loss_weight": 0.0, "train.grad_clip": 1e6},
    )  # fmt: skip
    gradients, weights, rates = [], [], []
    for step in range(10):
        trainer = trainer_for(recipe, Record())
        trainer.step = step
        weights.append(trainer._mtp_weight())
        rates.append(trainer._rate_scale())
        if step in (6, 7):
            trainer._update(next(packed_and_alone(recipe.data.sequence_length)), trainer.stage_at(step))
            gradients.append(trainer.model.mtp[0].e_proj.weight.grad)
    assert weights == [0.3] * 7 + [0.1] * 3
    assert [rate < 1 for rate in rates] == [weight == 0.1 for weight in weights]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], 3 * gradients[1])


def test_documents_too_short_for_an_entry_are_no_reason_to_stop(prepared):
    recipe = with_overrides(prepared, {"train.stages": [{"attention": "indexer_warmup", "steps": 1}]})
    trainer = trainer_for(recipe, Record())
    _, alone = packed_and_alone(recipe.data.sequence_length)
    alone["positions"][:] = torch.arange(alone["positions"].shape[1]) % 3
    measured = trainer._update(alone, trainer.stage_at(0))
    assert measured["train/indexer_kl"] == 0


def test_selection_is_measured_where_there_is_a_choice(prepared):
    """Batches without one neither hide the others' measure nor go unnoticed."""
    recipe = with_overrides(prepared, {"train.stages": [{"attention": "sparse", "steps": 1}]})
    trainer = trainer_for(recipe, Record())
    (whole, *_) = trainer._validation["mqar"]
    short = {**whole, "positions": torch.arange(whole["positions"].shape[1]).expand_as(whole["positions"]) % 3}
    trainer._validation = {"mqar": [whole]}
    expected = trainer.validate()
    trainer._validation = {"mqar": [whole, short]}
    found = trainer.validate()
    assert found["validation/recall_at_k"] == pytest.approx(expected["validation/recall_at_k"])
    assert found["validation/choosing_share"] == pytest.approx(expected["validation/choosing_share"] / 2)
    trainer._validation = {"mqar": [short]}
    none = trainer.validate()
    assert none["validation/choosing_share"] == 0 and "validation/recall_at_k" not in none


# --- resuming


@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_resuming_repeats_the_uninterrupted_run(prepared, tmp_path, mtp_layers):
    prepared = with_overrides(prepared, {"model.mtp_layers": mtp_layers})
    straight = Record(tmp_path / "a")
    whole = trainer_for(prepared, straight)
    whole.run()
    resumed = Record()
    second = trainer_for(prepared, resumed)
    second.load_checkpoint(tmp_path / "a" / "2")
    second.run()
    assert [s for s, _ in resumed.logged] == [3, 4, 5, 6]
    losses = {s: m["train/loss"] for s, m in straight.logged}
    assert all(m["train/loss"] == losses[s] for s, m in resumed.logged)
    assert any(".mtp." in f".{name}" for name in second.model.state_dict()) == bool(mtp_layers)
    for (name, p), q in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(p, q), name


def test_a_damaged_training_state_is_named(prepared, tmp_path):
    record = Record(tmp_path)
    trainer = trainer_for(prepared, record)
    trainer.run()
    (tmp_path / "6" / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer\.json: not a training state"):
        trainer_for(prepared, Record()).load_checkpoint(tmp_path / "6")


def with_short_rows(batch):
    batch = {name: values.clone() for name, values in batch.items()}
    batch["positions"][1::2] = torch.arange(batch["positions"].shape[1]) % 3
    return batch


def _rank(rank, world, port, recipe, short, out):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    trainer = trainer_for(recipe_from_dict(recipe), Record(), rank, world)
    _, alone = packed_and_alone(trainer.recipe.data.sequence_length)
    if short:  # the second rank has documents that are too short for a single entry
        alone = with_short_rows(alone)
    trainer._update({name: values[rank::world] for name, values in alone.items()}, trainer.stage_at(0))
    if rank == 0:
        save_file({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("short", [False, True])
def test_two_ranks_make_the_gradient_of_one(prepared, tmp_path, short):
    # float32 formats: a rounding border crossed by the last bit would be a real difference, but not of the averaging.
    recipe = with_overrides(
        prepared,
        {**EXACT, "model.mtp_layers": 1,
         "train.stages": [{"attention": "sparse", "steps": 1}]},
    )  # fmt: skip
    single = trainer_for(recipe, Record())
    _, alone = packed_and_alone(recipe.data.sequence_length)  # ranks get documents of different lengths
    single._update(with_short_rows(alone) if short else alone, single.stage_at(0))
    mp.spawn(_rank, (2, free_port(), recipe.to_dict(), short, str(tmp_path / "gradients")), nprocs=2)
    double = load_file(tmp_path / "gradients")
    for name, p in single.model.named_parameters():
        torch.testing.assert_close(double[name], p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(prepared):
    trainer = trainer_for(prepared, Record())
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.model.layers[0].attn.wkv.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FiftyfoldError, match="step 1: the gradient is not finite"):
        trainer.run()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_routers_move_towards_an_even_load(prepared):
    trainer = trainer_for(prepared, Record())
    layer = trainer.model.moe_layers()[1]
    layer.expert_load.copy_(torch.tensor([70.0, 10.0, 10.0, 10.0]))
    trainer._balance_routers(0.25)
    assert layer.router_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]
    assert layer.expert_load.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.index_topk": 24}, "24 is not below the 24 entries of a 96-token sequence"),
        ({"data.sequence_length": 300}, "exceeds model.max_positions 256"),
        ({"train.workers": 3}, "8 rows do not divide over 3 workers"),
        ({"model.hca_ratio": 128}, "128 tokens per entry leave a 96-token sequence without any entry"),
        ({"train.indexer_loss_weight": 0}, "leaves the indexer untrained"),
        ({"train.mtp_loss_weight": 0, "model.mtp_layers": 1}, "leaves the model's multi-token prediction untrained"),
        ({"model.layers": ["sliding"]}, "no csa layer to warm up"),
    ],
)
def test_a_stage_that_cannot_act_is_refused(prepared, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_stages(with_overrides(prepared, changes))


def test_an_answer_counts_only_whole():
    answer = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)
    assert count_answers(right, answer) == (2, 4)
