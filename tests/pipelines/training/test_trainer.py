"""The training loop itself, in plain torch processes."""

import copy
import json
import math

import pytest
import torch
from gloo import on_ranks
from plain_training import Record, gradients_on_rank, packed_and_alone, timeless, trainer_for, with_short_rows
from safetensors.torch import load_file, save_file

from model.config import CACHE_FORMATS
from model.errors import CheckpointError, ConfigError, DataError, FiftyfoldError
from model.moe import MixtureOfExperts
from model.telemetry import Telemetry
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest
from pipelines.data.packing import TargetKind
from pipelines.recipe.loading import with_overrides
from pipelines.training.build import build_trainer, folder_batches
from pipelines.training.curriculum import check_fills_batch, curriculum
from pipelines.training.loss_spikes import SpikeDetector
from pipelines.training.schedule import learning_rate_scale, mtp_loss_weight
from pipelines.training.validation import NAMES, count_answers

EXACT = {**{f"model.{name}": "fp32" for name in CACHE_FORMATS}, "model.qat": False}
"""Nothing is rounded anywhere."""


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


CHANGING = [
    {"attention": "dense", "steps": 2, "sequence_length": 48, "batch_rows": 12, "qat": False},
    {"attention": "indexer_warmup", "steps": 1, "indexer_learning_rate": 1e-3},
    {"attention": "sparse", "steps": 2, "index_topk": 8},
    {"attention": "sparse", "tokens": 800, "index_topk": 2, "learning_rate_scale": 0.5},
]
"""Every stage differs from the one before in what it can."""


@pytest.mark.parametrize("after", range(1, 6))
@pytest.mark.parametrize("mtp_layers", [pytest.param(0, marks=pytest.mark.long), 1])
def test_resuming_repeats_the_uninterrupted_run(prepared, tmp_path_factory, mtp_layers, after):
    recipe = with_overrides(
        prepared, {"model.mtp_layers": mtp_layers, "train.stages": CHANGING, "train.checkpoint_every": 1}
    )
    whole, straight = uninterrupted(recipe, tmp_path_factory)
    resumed = Record()
    second = trainer_for(recipe, resumed)
    torch.rand(after)  # the generator is elsewhere
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
    """The recipe's run from its start to its end, made once."""
    key = recipe.model.mtp_layers
    if key not in _RUNS:
        record = Record(tmp_path_factory.mktemp("straight"))
        trainer = trainer_for(recipe, record)
        trainer.run()
        trainer.random = torch.get_rng_state()
        _RUNS[key] = trainer, record
    return _RUNS[key]


def test_a_training_that_goes_on_needs_its_first_weights_no_more(prepared, tmp_path):
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
    """Also where one of them has documents that are too short for a single entry."""
    # float32 formats: a rounding border crossed by the last bit would be a real difference, but not of the averaging.
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


def test_accumulated_parts_make_the_update_of_the_whole(prepared):
    recipe = with_overrides(
        prepared, {**EXACT, "model.mtp_layers": 1, "train.stages": [{"attention": "sparse", "steps": 1}]}
    )
    _, alone = packed_and_alone(recipe.data.sequence_length)  # documents, and so parts, of different lengths
    trainers = [trainer_for(with_overrides(recipe, {"train.accumulation_steps": n}), Record()) for n in (1, 4)]
    whole, parts = (t.train_step(alone, t.stage) for t in trainers)
    for name in ("train/loss", "train/mtp_loss", "train/indexer_kl", "train/balance", "train/grad_norm"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=0)
    for (name, p), q in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# --- stages


def test_a_stage_is_what_it_says(prepared):
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


def test_what_is_rounded_is_counted(prepared):
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
    assert {name.partition("/layer_")[0] for name in measured} <= set(NAMES)  # what a sweep may ask for
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


def broken_at(trainer, steps):
    """Make the gradients of these updates, counted from 1, not finite."""
    update, made = trainer.train_step, []

    def sometimes(batch, stage):
        made.append(None)
        hook = None
        if len(made) in steps:
            hook = trainer.model.layers[0].attn.wkv.weight.register_hook(lambda grad: grad * float("nan"))
        try:
            return update(batch, stage)
        finally:
            if hook is not None:
                hook.remove()

    trainer.train_step = sometimes
    return made


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
    """Whatever brought it about: the checkpoint before is the last, and is good."""
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
    with pytest.raises(FiftyfoldError, match=r"step 4: 'layers\.1\.attn\.wkv\.weight.*' holds non-finite values"):
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
    with pytest.raises(CheckpointError, match=f"{file}: tensor '{key}' holds non-finite values"):
        trainer.load_checkpoint(tmp_path / "2")


def test_rolling_back_returns_to_the_last_checkpoint_and_reads_on(prepared, tmp_path):
    recipe = with_overrides(prepared, {"train.stability.action": "roll_back"})
    record = Record(tmp_path)
    trainer = trainer_for(recipe, record)
    made = broken_at(trainer, {6})  # after the checkpoint of step 4
    trainer.run()
    assert [step for step, _ in record.logged] == [1, 2, 3, 4, 5, 6, 5, 6] and len(made) == 8
    # A run that goes on from that checkpoint, but with the batches that follow the broken one, is the same.
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


def test_a_leaping_loss_is_noticed(prepared):
    settings = prepared.train.stability.model_copy(update={"window": 8, "spike": 1.0})
    watch = SpikeDetector(settings)
    losses = [5.0, 4.9, 4.8, 4.7, 4.6]
    assert not any(watch.reason_to_skip(step, loss, 1.0) for step, loss in enumerate(losses))
    assert watch.reason_to_skip(6, 5.9, 1.0) and not watch.reason_to_skip(7, 5.7, 1.0)
    again = SpikeDetector(settings)
    again.load(json.loads(json.dumps(watch.state())))
    assert again.interventions == 1 and again.reason_to_skip(8, 6.0, 1.0)
    watch.reset()
    assert not watch.reason_to_skip(8, 9.0, 1.0)
    stops = SpikeDetector(settings.model_copy(update={"action": "stop"}))
    with pytest.raises(FiftyfoldError, match="step 1: the gradient is not finite"):
        stops.reason_to_skip(1, 3.0, math.inf)


# --- anticipatory routing


ANTICIPATING = {
    "model.num_hash_layers": 0, "model.mtp_layers": 1, "train.accumulation_steps": 2,
    "train.stages": [{"attention": "dense", "steps": 2}, {"attention": "sparse", "steps": 12}],
    "train.stability": {"action": "roll_back", "anticipatory_routing": {"lag": 2, "steps": 6}},
    "train.router_bias_speed": 0.05, "train.optimizer.learning_rate": 0.02,
}  # fmt: skip


def watched_choices(trainer):
    """For every pass with an update, (updates made before, the next batch's tokens, what experts it ran by layer), and
    (updates made, weights) after every update or roll-back."""
    ran, weights = [], {0: copy.deepcopy(trainer.model)}
    update, mixture = trainer.train_step, MixtureOfExperts.mixture

    def watched(batch, stage):
        chosen = {}

        def spy(layer, routed, context):
            chosen.setdefault(layer.layer, []).append(routed["chosen"])
            return mixture(layer, routed, context)

        step = trainer.step
        assert not any(layer.expert_load.any() for layer in trainer.model.moe_layers())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MixtureOfExperts, "mixture", spy)
            measured = update(batch, stage)
        ran.append((step, batch, {layer: torch.cat(parts) for layer, parts in chosen.items()}))
        weights[trainer.step] = copy.deepcopy(trainer.model)
        return measured

    trainer.train_step = watched
    return ran, weights


def chosen_by(model, batch, attention):
    telemetry = Telemetry(predict_ahead=True)
    with torch.no_grad():
        model(batch["tokens"][:, :-1], positions=batch["positions"], attention=attention, telemetry=telemetry)
    return telemetry.chosen


def agreement(one, two):
    return min(float((one[layer] == two[layer]).float().mean()) for layer in two)


def test_after_a_roll_back_older_weights_choose_the_experts_for_a_while(prepared, tmp_path):
    recipe = with_overrides(prepared, ANTICIPATING)
    record = Record(tmp_path)
    trainer = trainer_for(recipe, record)
    ran, weights = watched_choices(trainer)
    broken_at(trainer, {6})  # back to the checkpoint of step 4
    trainer.run()
    logged = {s: m for s, m in record.logged}  # the later one of two
    lags = {s: m["train/anticipation_lag"] for s, m in logged.items() if "train/anticipation_lag" in m}
    assert lags == {5: 0, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2}
    assert all(logged[s]["train/anticipation_seconds"] > 0 for s in lags)
    after = {step: (batch, chosen) for step, batch, chosen in ran}
    for step, (batch, chosen) in after.items():
        # The weights of each step remembered are those of its last visit, also where it was rolled back to.
        source = step - int(lags.get(step + 1, 0))
        mode = "dense" if step < 2 else "sparse"
        found = chosen_by(weights[source], batch, mode)
        assert agreement(chosen, found) > 0.98, step  # the whole batch at once rounds otherwise than its two parts
        if source < step:  # and another choice than the present weights'
            assert agreement(chosen, chosen_by(weights[step], batch, mode)) < 0.9, step
    ((step, what),) = record.events
    assert step == 6 and what.startswith("the gradient is not finite")
    assert what.endswith("rolled back to step 4, 6 updates with experts routed 2 ahead (intervention 1 of 3)")


@pytest.mark.parametrize("after", [4, 6, 8, 12])
def test_choices_made_ahead_survive_a_resume(anticipating, after):
    whole, straight = anticipating
    record = Record()
    second = trainer_for(whole.recipe, record)
    second.load_checkpoint(straight.keep / str(after))
    if after == 4:  # the checkpoint was written before the spike, which comes again
        broken_at(second, {2})
    second.run()
    # As text, where not a number equals itself.
    assert repr(timeless(record.logged)) == repr(timeless(straight.logged)[-len(record.logged) :])
    for (name, p), q in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(p, q), name


@pytest.fixture(scope="module")
def anticipating(prepared, tmp_path_factory):
    record = Record(tmp_path_factory.mktemp("anticipating"))
    trainer = trainer_for(with_overrides(prepared, ANTICIPATING), record)
    broken_at(trainer, {6})
    trainer.run()
    return trainer, record


def test_choices_made_ahead_end_with_their_stage(prepared):
    recipe = with_overrides(
        prepared,
        {**ANTICIPATING, "train.stages": [{"attention": "dense", "steps": 6}, {"steps": 3, "sequence_length": 64}]},
    )
    record = Record()
    trainer = trainer_for(recipe, record)
    broken_at(trainer, {3})
    trainer.run()
    assert [s for s, m in record.logged if "train/anticipation_lag" in m] == [3, 4, 5, 6]


def test_routing_ahead_needs_a_roll_back_and_a_router(prepared):
    ahead = {"lag": 2, "steps": 6}
    with pytest.raises(ConfigError, match=r"train\.stability: anticipatory_routing requires action: roll_back"):
        with_overrides(prepared, {"train.stability.anticipatory_routing": ahead})
    for changes in ({"model.ffn": "dense"}, {"model.num_hash_layers": 3}):
        recipe = with_overrides(
            prepared, {"train.stability": {"action": "roll_back", "anticipatory_routing": ahead}, **changes}
        )
        with pytest.raises(ConfigError, match="no layer of the model has a router"):
            curriculum(recipe)


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
        ({"model.index_topk": 24}, r"train.stages.2: index_topk 24 is not below the 24 entries of a 96-token sequence"),
        ({"data.sequence_length": 300}, r"train.stages.0.sequence_length: 300 exceeds model.max_positions 256"),
        ({"train.workers": 3}, r"train.stages.0.batch_rows: 8 rows do not divide over 3 workers and 1 accumulation"),
        ({"train.accumulation_steps": 3}, "8 rows do not divide over 1 workers and 3 accumulation steps"),
        ({"train.stages": [{"tokens": 700}]}, r"train.stages.0.tokens: fewer than the 768 of a single step"),
        ({"train.stages": [{"steps": 1, "index_topk": 24}]}, "index_topk 24 is not below the 24 entries of a 96-token"),
        ({"train.stages": [{"steps": 1, "sequence_length": 16}]}, "not below the 4 entries of a 16-token sequence"),
        (
            {"model.layers": ["sliding"], "train.stages": [{"attention": "dense", "steps": 1, "index_topk": 3}]},
            r"train.stages.0.index_topk: 3 is set, but model.layers has no csa layer",
        ),
        ({"model.hca_ratio": 128}, "128 tokens per entry leave a 96-token sequence without any entry"),
        ({"train.indexer_loss_weight": 0}, "leaves the indexer untrained"),
        ({"train.mtp_loss_weight": 0, "model.mtp_layers": 1}, "leaves the model's multi-token prediction untrained"),
        ({"model.layers": ["sliding"]}, "no csa layer to warm up"),
        (
            {**EXACT, "model.qat": True, "model.ffn": "dense"},
            r"train.stages.0: quantization-aware training is on, but quantizes no tensor",
        ),
    ],
)
def test_a_stage_that_cannot_act_is_refused(prepared, changes, message):
    with pytest.raises(ConfigError, match=message):
        curriculum(with_overrides(prepared, changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.stages": [{}]}, r"train.stages.0: a stage has either steps or tokens"),
        ({"train.stages": [{"steps": 3, "tokens": 3000}]}, r"train.stages.0: a stage has either steps or tokens"),
        ({"train.stages": [{"steps": 0}]}, r"train.stages.0.steps: .* greater than or equal to 1, found 0"),
        ({"train.stages": []}, "train.stages: .* at least 1 item"),
        (
            {"train.stages": [{"steps": 1, "learning_rate_scale": 0}]},
            r"train.stages.0.learning_rate_scale: .* greater than 0, found 0",
        ),
        (
            {"train.stages": [{"steps": 1, "learning_rate_scale": math.inf}]},
            r"train.stages.0.learning_rate_scale: Input should be a finite number, found inf",
        ),
        ({"train.optimizer.learning_rate": 0}, "train.optimizer.learning_rate: must be positive, found 0"),
        ({"train.optimizer.weight_decay": math.nan}, "train.optimizer.weight_decay: must be 0 or more, found nan"),
    ],
)
def test_a_stage_without_a_step_or_a_rate_is_refused(prepared, changes, named):
    with pytest.raises(ConfigError, match=named):
        with_overrides(prepared, changes)


def test_data_that_fill_no_batch_are_refused_before_any_compute(prepared):
    manifest = read_manifest(prepared.data_folder)
    there = sum(1 for _ in local_rows(prepared.data_folder, "train", 96))
    stages = [{"steps": 1, "batch_rows": rows} for rows in (there, there + 1)]
    enough, too_many = curriculum(with_overrides(prepared, {"train.stages": stages}))
    check_fills_batch((enough,), prepared.data_folder, manifest)
    with pytest.raises(
        DataError, match=rf"fill {there} rows of 96, fewer than the {there + 1} of one batch of train\.stages\.1$"
    ):
        check_fills_batch((enough, too_many), prepared.data_folder, manifest)


def test_a_short_stage_reads_no_cut_retrieval_document(prepared):
    short = with_overrides(prepared, {"train.stages": [{"attention": "dense", "steps": 1, "sequence_length": 48}]})
    batches = folder_batches(short)(curriculum(short)[0], 0, 0)
    kinds = torch.cat([next(batches)["target_kind"] for _ in range(5)])
    assert kinds.shape[1] == 48 and set(kinds.unique().tolist()) <= {TargetKind.PADDING, TargetKind.TEXT}


def test_an_answer_counts_only_whole():
    answer = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)
    assert count_answers(right, answer) == (2, 4)
