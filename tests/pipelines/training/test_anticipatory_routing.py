"""Anticipatory routing after a rollback, and its checkpoints."""

import copy

import pytest
import torch
from plain_training import (
    Record,
    broken_at,
    timeless,
    trainer_for,
)

from model.errors import ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.moe import MixtureOfExperts
from pipelines.recipe.loading import with_overrides
from pipelines.training.curriculum import curriculum

ANTICIPATING = {
    "model.num_hash_layers": 0, "model.mtp_layers": 1, "train.accumulation_steps": 2,
    "train.stages": [{"attention": "dense", "steps": 2}, {"attention": "sparse", "steps": 12}],
    "train.stability": {"action": "roll_back", "anticipatory_routing": {"lag": 2, "steps": 6}},
    "train.router_bias_speed": 0.05, "train.optimizer.learning_rate": 0.02,
}  # fmt: skip


def watch_experts(trainer):
    """Record (updates made before, batch, expert ids by layer) of every train step, and the weights by step."""
    ran, weights = [], {0: copy.deepcopy(trainer.model)}
    update, route = trainer.train_step, MixtureOfExperts.route

    def watched(batch, stage):
        chosen = {}

        def spy(layer, x, input_ids, context):
            routed = route(layer, x, input_ids, context)
            chosen.setdefault(layer.layer, []).append(routed[1])
            return routed

        step = trainer.step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MixtureOfExperts, "route", spy)
            measured = update(batch, stage)
        ran.append((step, batch, {layer: torch.cat(parts) for layer, parts in chosen.items()}))
        weights[trainer.step] = copy.deepcopy(trainer.model)
        return measured

    trainer.train_step = watched
    return ran, weights


def chosen_by(model, batch, attention):
    aux = AuxOutputs(predict_ahead=True)
    with torch.no_grad():
        model(batch["tokens"][:, :-1], positions=batch["positions"], attention=attention, aux=aux)
    return aux.expert_ids


def agreement(one, two):
    return min(float((one[layer] == two[layer]).float().mean()) for layer in two)


def test_after_a_rollback_older_weights_route_for_a_while(prepared, tmp_path):
    recipe = with_overrides(prepared, ANTICIPATING)
    record = Record(tmp_path)
    trainer = trainer_for(recipe, record)
    ran, weights = watch_experts(trainer)
    broken_at(trainer, {6})  # back to the checkpoint of step 4
    trainer.run()
    logged = {s: m for s, m in record.logged}  # the later one of two at a step
    lags = {s: m["train/anticipation_lag"] for s, m in logged.items() if "train/anticipation_lag" in m}
    assert lags == {5: 0, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2}
    assert all(logged[s]["train/anticipation_seconds"] > 0 for s in lags)
    after = {step: (batch, chosen) for step, batch, chosen in ran}
    for step, (batch, chosen) in after.items():
        # The recorded weights of a step are those of its last visit, also after a rollback.
        source = step - int(lags.get(step + 1, 0))
        mode = "dense" if step < 2 else "sparse"
        found = chosen_by(weights[source], batch, mode)
        assert agreement(chosen, found) > 0.98, step  # rounding differs between a batch and its microbatches
        if source < step:  # and differs from the current weights' selection
            assert agreement(chosen, chosen_by(weights[step], batch, mode)) < 0.9, step
    ((step, what),) = record.events
    assert step == 6 and what.startswith("the gradient is not finite")
    assert what.endswith("rolled back to step 4, 6 updates with experts routed 2 ahead (intervention 1 of 3)")


@pytest.mark.parametrize("after", [4, 6, 8, 12])
def test_expert_ids_survive_a_resume(anticipating, after):
    whole, straight = anticipating
    record = Record()
    second = trainer_for(whole.recipe, record)
    second.load_checkpoint(straight.keep / str(after))
    if after == 4:  # written before the broken update, which is repeated
        broken_at(second, {2})
    second.run()
    # Compared as text, in which nan equals nan.
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


def test_anticipatory_routing_ends_with_its_stage(prepared):
    recipe = with_overrides(
        prepared,
        {**ANTICIPATING, "train.stages": [{"attention": "dense", "steps": 6}, {"steps": 3, "sequence_length": 64}]},
    )
    record = Record()
    trainer = trainer_for(recipe, record)
    broken_at(trainer, {3})
    trainer.run()
    assert [s for s, m in record.logged if "train/anticipation_lag" in m] == [3, 4, 5, 6]


def test_anticipatory_routing_needs_a_rollback_and_a_router(prepared):
    ahead = {"lag": 2, "steps": 6}
    with pytest.raises(ConfigError, match=r"^train\.stability\.anticipatory_routing: needs action roll_back, found"):
        with_overrides(prepared, {"train.stability.anticipatory_routing": ahead})
    for changes in ({"model.ffn": "dense"}, {"model.num_hash_layers": 3}):
        recipe = with_overrides(
            prepared, {"train.stability": {"action": "roll_back", "anticipatory_routing": ahead}, **changes}
        )
        with pytest.raises(ConfigError, match="no layer of the model has a router"):
            curriculum(recipe)
