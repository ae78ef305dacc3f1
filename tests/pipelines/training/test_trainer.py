"""The training loop in plain PyTorch processes."""

import json
import math

import pytest
import torch
from gloo import on_ranks
from plain_training import (
    EXACT,
    Record,
    broken_at,
    gradients_on_rank,
    packed_and_alone,
    timeless,
    trainer_for,
    with_short_rows,
)
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError, FiftyfoldError
from pipelines.data.packing import TargetKind
from pipelines.recipe.loading import with_overrides
from pipelines.training.build import build_trainer, folder_batches
from pipelines.training.curriculum import curriculum
from pipelines.training.schedule import learning_rate_scale, mtp_loss_weight


def test_losses_fall_and_everything_is_reported(prepared):
    recipe = with_overrides(
        prepared,
        {"model.mtp_layers": 1,
         "train.stages": [{"attention": "dense", "steps": 22}, {"attention": "sparse", "steps": 3}]},
    )  # fmt: skip
    record = Record()
    trainer = trainer_for(recipe, record)
    before = trainer.validate()
    trainer.run()
    for name in ("train/loss", "train/mtp_loss"):
        losses = [m[name] for _, m in record.logged]
        assert len(losses) == 25 and losses[-1] < losses[0] - 1, name
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
    assert last["validation/mtp_loss"] < before["validation/mtp_loss"] - 1


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
    one, two = (t.train_step(batch, t.stage) for t, batch in zip(trainers, (packed, alone)))
    for name in ("train/loss", "train/mtp_loss"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=0)
    for (name, p), q in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# --- multi-token prediction


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
        weights.append(mtp_loss_weight(recipe.train, step, trainer.total_steps))
        rates.append(learning_rate_scale(recipe.train, step, trainer.total_steps))
        if step in (6, 7):
            trainer.train_step(next(packed_and_alone(recipe.data.sequence_length)), trainer.stage)
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
    measured = trainer.train_step(alone, trainer.stage)
    assert measured["train/indexer_kl"] == 0


# --- resuming


CHANGING = [
    {"attention": "dense", "steps": 2, "sequence_length": 48, "batch_rows": 12, "qat": False},
    {"attention": "indexer_warmup", "steps": 1, "indexer_learning_rate": 1e-3},
    {"attention": "sparse", "steps": 2, "index_topk": 8},
    {"attention": "sparse", "tokens": 800, "index_topk": 2, "learning_rate_scale": 0.5},
]

"""Every stage differs from the previous one."""


@pytest.mark.parametrize("after", range(1, 6))
@pytest.mark.parametrize("mtp_layers", [pytest.param(0, marks=pytest.mark.long), 1])
def test_resuming_repeats_the_uninterrupted_run(prepared, tmp_path_factory, mtp_layers, after):
    recipe = with_overrides(
        prepared, {"model.mtp_layers": mtp_layers, "train.stages": CHANGING, "train.checkpoint_every": 1}
    )
    whole, straight = uninterrupted(recipe, tmp_path_factory)
    resumed = Record()
    second = trainer_for(recipe, resumed)
    torch.rand(after)  # move the generator
    second.load_checkpoint(straight.keep / str(after))
    second.run()
    assert [s for s, _ in resumed.logged] == list(range(after + 1, 7))
    assert timeless(resumed.logged) == timeless(straight.logged)[after:]
    assert resumed.reported[-1] == straight.reported[-1]
    assert second.best == whole.best and torch.equal(torch.get_rng_state(), whole.random)
    for (name, p), q in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(p, q), name


_RUNS = {}


def uninterrupted(recipe, tmp_path_factory):
    """Return the recipe's uninterrupted run, made once per setting."""
    key = recipe.model.mtp_layers
    if key not in _RUNS:
        record = Record(tmp_path_factory.mktemp("straight"))
        trainer = trainer_for(recipe, record)
        trainer.run()
        trainer.random = torch.get_rng_state()
        _RUNS[key] = trainer, record
    return _RUNS[key]


def test_a_resumed_training_does_not_need_init_from(prepared, tmp_path):
    trainer_for(prepared, Record(tmp_path)).run()
    gone = with_overrides(prepared, {"train.init_from": str(tmp_path / "gone")})
    again = build_trainer(gone, folder_batches(gone), Record(), last=tmp_path / "4")
    assert again.step == 4
    with pytest.raises(CheckpointError, match="gone"):
        build_trainer(gone, folder_batches(gone), Record())


def test_a_damaged_training_state_is_named(prepared, tmp_path):
    trainer_for(prepared, Record(tmp_path)).run()
    path = tmp_path / "6" / "trainer.json"
    state = json.loads(path.read_text())
    for damaged, message in (
        ({}, r"trainer\.json: not a training state"),
        ({**state, "best": ["low"]}, r"trainer\.json: not a training state"),
        ({**state, "stability": {}}, "stability: not a valid state"),
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=message):
            trainer_for(prepared, Record()).load_checkpoint(tmp_path / "6")


def test_two_ranks_make_the_gradient_of_one(prepared, tmp_path):
    """Also if one rank's documents are too short for any entry."""
    # float32 formats: quantization would amplify differences in the last bit.
    recipe = with_overrides(
        prepared,
        {**EXACT, "model.mtp_layers": 1,
         "train.stages": [{"attention": "sparse", "steps": 1}]},
    )  # fmt: skip
    on_ranks(2, gradients_on_rank, recipe.to_dict(), tmp_path)
    _, alone = packed_and_alone(recipe.data.sequence_length)  # ranks get documents of different lengths
    for name, rows in (("alone", alone), ("short", with_short_rows(alone))):
        single = trainer_for(recipe, Record())
        single.train_step(rows, single.stage)
        double = load_file(tmp_path / name)
        for parameter, p in single.model.named_parameters():
            torch.testing.assert_close(
                double[parameter], p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
            )


def test_accumulated_microbatches_equal_the_whole_batch(prepared):
    recipe = with_overrides(
        prepared, {**EXACT, "model.mtp_layers": 1, "train.stages": [{"attention": "sparse", "steps": 1}]}
    )
    _, alone = packed_and_alone(recipe.data.sequence_length)  # documents, and so microbatches, of different lengths
    trainers = [trainer_for(with_overrides(recipe, {"train.accumulation_steps": n}), Record()) for n in (1, 4)]
    whole, parts = (t.train_step(alone, t.stage) for t in trainers)
    for name in ("train/loss", "train/mtp_loss", "train/indexer_kl", "train/balance", "train/grad_norm"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=0)
    for (name, p), q in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# --- stages


def test_a_stage_applies_its_settings(prepared):
    trainer = trainer_for(with_overrides(prepared, {"train.stages": CHANGING}), Record())
    seen, rates = [], []
    update = trainer.train_step

    def watched(batch, stage):
        config = trainer.model.config
        seen.append((*batch["target_kind"].shape, config.qat, config.index_topk, stage.attends))
        measured = update(batch, stage)
        rates.append(measured["train/learning_rate/indexer"])
        assert bool(sum(v for k, v in measured.items() if k.startswith("train/rounded/"))) == config.qat
        return measured

    trainer.train_step = watched
    trainer.run()
    assert seen == [
        (12, 48, False, 4, "dense"),
        (12, 48, False, 4, "dense"),
        (8, 96, True, 4, "dense"),
        (8, 96, True, 8, "sparse"),
        (8, 96, True, 8, "sparse"),
        (8, 96, True, 2, "sparse"),
    ]
    assert rates[2] == pytest.approx(1e-3) and rates[3] == pytest.approx(3e-3)
    assert trainer.model.layers[1].attn.config.index_topk == 2


def test_quantized_tensors_are_counted(prepared):
    trainer = trainer_for(with_overrides(prepared, {"train.stages": [{"attention": "sparse", "steps": 1}]}), Record())
    _, alone = packed_and_alone(96)
    measured = trainer.train_step(alone, trainer.stage)
    # Windows of three layers and entries of two; queries and keys of one indexer; three stacks in each of three layers.
    counts = {k.rpartition("/")[2]: v for k, v in measured.items() if k.startswith("train/rounded/")}
    assert counts == {"main": 5, "index": 2, "experts": 9}


def test_every_stage_reports_what_it_reached_and_keeps_it(prepared, tmp_path):
    record = Record(tmp_path)
    trainer_for(prepared, record).run()
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["2", "3", "4", "6"]
    measured = {key.removeprefix("validation/") for key in record.reported[-1][1] if key.startswith("validation/")}
    assert {"loss", "recall_at_k/layer_1"} <= measured
    ends = {step: metrics for step, metrics in record.reported if any(k.startswith("stage_") for k in metrics)}
    assert list(ends) == [3, 4, 6]
    for stage, (_, metrics) in enumerate(ends.items(), 1):
        assert metrics[f"stage_{stage}/loss"] == metrics["validation/loss"] and f"stage_{stage}/step" not in metrics
        for name in (
            "indexer_kl",
            "recall_at_k",
            "recall_at_k_of_best",
            "recall_at_k_of_best/layer_1",
            "choosing_share",
        ):
            assert metrics[f"stage_{stage}/{name}"] == metrics[f"validation/{name}"], name
    assert 0 < ends[6]["stage_3/recall_at_k"] <= ends[6]["stage_3/recall_at_k_of_best"] <= 1 + 1e-6


# --- stability


def test_a_gradient_that_is_not_finite_costs_its_batch_alone(prepared):
    record = Record()
    trainer = trainer_for(prepared, record)
    broken_at(trainer, {2})
    before = {}
    trainer.reporter.log = lambda step, metrics: (
        record.logged.append((step, metrics)),
        before.setdefault(step, trainer.model.head.weight.detach().clone()),
    )
    trainer.run()
    assert torch.equal(before[1], before[2]) and not torch.equal(before[2], before[3])
    assert [m.get("train/interventions") for _, m in record.logged] == [None, 1, None, None, None, None]


def test_a_run_that_is_not_finite_ends_after_so_many_times_and_names_the_step(prepared):
    trainer = trainer_for(with_overrides(prepared, {"train.stability.max_interventions": 2}), Record())
    broken_at(trainer, range(1, 7))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(FiftyfoldError, match=r"step 3: the gradient is not .*stability\.max_interventions is 2"):
        trainer.run()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_no_checkpoint_holds_a_number_that_is_not_finite(prepared, tmp_path, where):
    """The previous checkpoint is the last one, and is good."""
    recipe = with_overrides(prepared, {"train.stages": [{"attention": "dense", "steps": 6}]})
    record = Record(tmp_path)
    trainer = trainer_for(recipe, record)
    step, weight = trainer.optimizer.step, trainer.model.layers[1].attn.wkv.weight

    @torch.no_grad()
    def breaks():
        step()
        if trainer.step == 3:
            (weight if where == "weights" else trainer.optimizer.state[weight]["momentum"])[0, 0] = math.inf

    trainer.optimizer.step = breaks
    with pytest.raises(
        FiftyfoldError, match=r"step 4: 'layers\.1\.attn\.wkv\.weight.*' holds values that are not finite"
    ):
        trainer.run()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    second = trainer_for(recipe, Record())
    second.load_checkpoint(tmp_path / "2")
    second.run()
    assert second.step == 6


@pytest.mark.parametrize(
    ("file", "key"), [("model.safetensors", "head.weight"), ("optimizer.safetensors", "head.weight/exp_avg")]
)
def test_a_checkpoint_that_is_not_finite_is_refused(prepared, tmp_path, file, key):
    trainer_for(prepared, Record(tmp_path)).run()
    tensors = load_file(tmp_path / "2" / file)
    tensors[key].view(-1)[3] = math.nan
    save_file(tensors, tmp_path / "2" / file)
    trainer = trainer_for(prepared, Record())
    with pytest.raises(CheckpointError, match=f"{file}: tensor '{key}' holds values that are not finite"):
        trainer.load_checkpoint(tmp_path / "2")


def test_rolling_back_returns_to_the_last_checkpoint_and_reads_on(prepared, tmp_path):
    recipe = with_overrides(prepared, {"train.stability.action": "roll_back"})
    record = Record(tmp_path)
    trainer = trainer_for(recipe, record)
    made = broken_at(trainer, {6})  # after the checkpoint of step 4
    trainer.run()
    assert [step for step, _ in record.logged] == [1, 2, 3, 4, 5, 6, 5, 6] and len(made) == 8
    # Equal to a run that resumes from that checkpoint and skips the batches up to the broken one.
    state = json.loads((tmp_path / "4" / "trainer.json").read_text())
    state["position"]["batch"] += 2
    (tmp_path / "4" / "trainer.json").write_text(json.dumps(state))
    second = trainer_for(recipe, Record())
    second.load_checkpoint(tmp_path / "4")
    second.run()
    for (name, p), q in zip(trainer.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(p, q), name


def test_rolling_back_forgets_a_best_that_is_undone(prepared):
    trainer = trainer_for(prepared, Record())
    trainer.best = (5.0, 0)
    kept = trainer.snapshot()
    trainer.best = (1.0, 3)
    trainer._roll_back(kept)
    assert trainer.best == (5.0, 0)


def test_routers_move_towards_an_even_load(prepared):
    trainer = trainer_for(prepared, Record())
    layer = trainer.model.moe_layers()[1]
    trainer._balance_routers({layer.layer: torch.tensor([70, 10, 10, 10])}, 0.25)
    assert layer.router_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_a_short_stage_reads_no_cut_retrieval_document(prepared):
    short = with_overrides(prepared, {"train.stages": [{"attention": "dense", "steps": 1, "sequence_length": 48}]})
    batches = folder_batches(short)(curriculum(short)[0], 0, 0)
    kinds = torch.cat([next(batches)["target_kind"] for _ in range(5)])
    assert kinds.shape[1] == 48 and set(kinds.unique().tolist()) <= {TargetKind.PADDING, TargetKind.TEXT}
