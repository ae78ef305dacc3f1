"""Data types for ``auto``: chosen on rank 0, reported, stored, and kept by resumed runs."""

import json

import pytest
import torch
from gloo import on_ranks
from plain_training import Record, trainer_for

from model.errors import CheckpointError
from model.optim import muon_adamw
from model.transformer import Transformer
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.training import compute_dtype
from pipelines.training.build import build_trainer, folder_batches
from pipelines.training.compute_dtype import BF16, FLOAT32

AUTO = dict.fromkeys(BF16, "auto")
MACHINES = [(True, BF16, torch.bfloat16), (False, FLOAT32, torch.float32)]
IDS = ["fast", "slow"]


@pytest.fixture
def auto(prepared):
    return with_overrides(prepared, {**AUTO, "train.checkpoint_every": 2, "train.validate_every": 100})


def machine(monkeypatch, fast):
    monkeypatch.setattr(compute_dtype, "multiplies_bf16_fast", lambda device: fast)


@pytest.fixture
def computed(monkeypatch):
    """Record the data types of the network's and the optimizer's matrix products in training."""
    seen, forward, newton_schulz = set(), Transformer.forward, muon_adamw.newton_schulz

    def watched(self, tokens, **options):
        if self.training:
            on = torch.is_autocast_enabled("cpu")
            seen.add(("network", torch.get_autocast_dtype("cpu") if on else torch.float32))
        return forward(self, tokens, **options)

    def iterated(matrices, coefficients, dtype):
        seen.add(("optimizer", dtype))
        return newton_schulz(matrices, coefficients, dtype)

    monkeypatch.setattr(Transformer, "forward", watched)
    monkeypatch.setattr(muon_adamw, "newton_schulz", iterated)
    return seen


def losses(record):
    return [(step, metrics["train/loss"]) for step, metrics in record.logged]


@pytest.mark.parametrize(("fast", "choice", "dtype"), MACHINES, ids=IDS)
def test_a_machine_chooses_its_faster_type(auto, tmp_path, monkeypatch, computed, fast, choice, dtype):
    machine(monkeypatch, fast)
    record = Record(tmp_path)
    trainer = trainer_for(auto, record)
    trainer.run()
    assert compute_dtype.settings_of(trainer.recipe) == choice == compute_dtype.read(tmp_path / "6")
    assert computed == {("network", dtype), ("optimizer", dtype)}
    ((step, told),) = record.events
    assert step == 0 and told == (
        f"train.autocast is {choice['train.autocast']}, train.optimizer.ns_dtype is "
        f"{choice['train.optimizer.ns_dtype']} (auto: BF16 products are {'' if fast else 'not '}faster here)"
    )


@pytest.mark.parametrize(("fast", "choice", "dtype"), MACHINES, ids=IDS)
def test_a_run_resumed_elsewhere_keeps_its_choice(auto, tmp_path, monkeypatch, computed, fast, choice, dtype):
    """Bit-exactly, for either choice, on a machine that would choose the other."""
    machine(monkeypatch, fast)
    straight = Record(tmp_path / "straight")
    unbroken = trainer_for(auto, straight)
    unbroken.run()

    machine(monkeypatch, not fast)
    record = Record(tmp_path / "resumed")
    resumed = build_trainer(auto, folder_batches(auto), record, last=tmp_path / "straight" / "2")
    resumed.run()
    assert computed == {("network", dtype), ("optimizer", dtype)}
    assert losses(record) == losses(straight)[2:]
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, unbroken.model.state_dict()[name]), name
    assert compute_dtype.read(tmp_path / "resumed" / "6") == choice
    begun, (step, told) = record.events
    assert (
        begun == (2, "resumed")
        and step == 2
        and "(auto: kept from the checkpoint)" in told
        and ("emulated" in told) == fast
    )


def test_emulated_bf16_is_reported(prepared, monkeypatch):
    recipe = with_overrides(prepared, {"train.autocast": "bfloat16"})
    for fast in (True, False):
        machine(monkeypatch, fast)
        record = Record()
        trainer = trainer_for(recipe, record)
        assert trainer.recipe.train.autocast == "bfloat16" and trainer.recipe.train.optimizer.ns_dtype == "float32"
        emulated = (0, "BF16 products are emulated on this processor, several times slower than float32")
        assert record.events == ([] if fast else [emulated])


def test_fsdp_gathers_in_the_chosen_type(auto, monkeypatch):
    recipe = with_overrides(auto, {"train.workers": 2, "train.sharding": "fsdp", "model.qat": False})
    gathered = []
    monkeypatch.setattr("pipelines.training.build.shard", lambda model, device, dtype: gathered.append(dtype))
    for fast, _, _ in MACHINES:
        machine(monkeypatch, fast)
        trainer_for(recipe, Record(), rank=0, world=2)
    assert gathered == [dtype for _, _, dtype in MACHINES]


def two_kinds_of_machines(rank, world, recipe, folder):
    compute_dtype.multiplies_bf16_fast = lambda device: rank == 0
    trainer = trainer_for(recipe_from_dict(recipe), Record(), rank, world)
    (folder / f"{rank}.json").write_text(json.dumps(compute_dtype.settings_of(trainer.recipe)))


def test_all_ranks_have_rank_0s_choice(auto, tmp_path):
    recipe = with_overrides(auto, {"train.workers": 2})
    on_ranks(2, two_kinds_of_machines, recipe.to_dict(), tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [BF16, BF16]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", json.dumps({**BF16, "train.autocast": "int8"})])
def test_a_checkpoint_without_valid_dtypes_is_refused(auto, tmp_path, content):
    if content is not None:
        (tmp_path / compute_dtype.FILE).write_text(content)
    with pytest.raises(CheckpointError, match=compute_dtype.FILE):
        build_trainer(auto, folder_batches(auto), Record(), last=tmp_path)
