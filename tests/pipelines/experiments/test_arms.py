"""Arms of the ablation and of the comparison."""

import pytest

from model.errors import ConfigError
from pipelines.experiments.ablation import cost_stages
from pipelines.experiments.arms import CHOICES, ablation_arms, comparison_arms, with_flops, with_rate
from pipelines.experiments.flops import training_flops
from pipelines.recipe.loading import load_recipe, with_overrides
from pipelines.training.curriculum import curriculum, total_steps


@pytest.fixture(scope="module")
def tiny():
    return load_recipe(["configs/tiny.yaml"], ["train.optimizer.ns_dtype=float32", "train.autocast=none"])


def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}").items()}
    return {prefix.strip("."): value}


def changed(recipe, arm):
    """Return the keys that differ, without the stages."""
    before, after = flat(recipe.to_dict()), flat(arm.recipe.to_dict())
    return {key for key in before | after if before.get(key) != after.get(key)} - {"train.stages"}


def test_each_arm_takes_one_choice_away(tiny):
    arms = {arm.name: arm for arm in ablation_arms(tiny)}
    assert list(arms) == ["full", *CHOICES, "none"]
    assert arms["full"].recipe == tiny
    assert changed(tiny, arms["attention"]) == {"model.layers"}
    assert changed(tiny, arms["precision"]) == {"model.kv_format", "model.index_format"}
    assert changed(tiny, arms["muon"]) == {"train.optimizer.rule"}
    assert changed(tiny, arms["hyper_connections"]) == {"model.hyper_connections"}
    assert changed(tiny, arms["qat"]) == {"model.qat"}
    alone = set.union(*(changed(tiny, arms[choice]) for choice in CHOICES))
    assert changed(tiny, arms["none"]) == alone
    assert all(total_steps(arm.recipe) == total_steps(tiny) for arm in arms.values())
    assert {stage.attention for stage in curriculum(arms["attention"].recipe)} == {"dense"}


def test_only_the_network_without_qat_is_scored_in_another_configuration(tiny):
    scored = {arm.name: dict(arm.scored) for arm in ablation_arms(tiny) if arm.scored}
    assert scored == {"qat": {"qat": True}}


def test_a_choice_that_the_recipe_does_not_make_cannot_be_taken_away(tiny):
    plain = with_overrides(tiny, {"model.hyper_connections": False})
    with pytest.raises(ConfigError, match=r"ablate\.choices: the recipe does not use hyper_connections"):
        ablation_arms(plain)


def test_variants_are_further_arms(tiny):
    variants = {"wide": {"model.window": 8}}
    recipe = with_overrides(tiny, {"ablate.choices": [], "ablate.variants": variants})
    full, wide = ablation_arms(recipe)
    assert changed(recipe, wide) == {"model.window"} and full.name == "full"
    for variants, message in (
        ({"full": {"model.window": 8}}, "'full' is the name of an arm"),
        ({"odd": {"model.windo": 8}}, r"ablate\.variants\.odd\.model\.windo: unknown key"),
        ({}, "neither ablate.choices nor ablate.variants names an arm"),
    ):
        with pytest.raises(ConfigError, match=message):
            ablation_arms(with_overrides(tiny, {"ablate.choices": [], "ablate.variants": variants}))


GQA_ARMS = ("attention", "none")


def test_arms_without_hybrid_attention_take_the_options_of_gqa(tiny):
    arms = ablation_arms(with_overrides(tiny, {"ablate.gqa_options": {"conv_kernel": 4}}))
    kernels = {arm.name: arm.recipe.model.mixer_options["gqa"]["conv_kernel"] for arm in arms if arm.name in GQA_ARMS}
    assert kernels == dict.fromkeys(GQA_ARMS, 4)
    with pytest.raises(ConfigError, match=r"^ablate\.gqa_options\.kernel: unknown option; there are conv_kernel"):
        ablation_arms(with_overrides(tiny, {"ablate.gqa_options": {"kernel": 4}}))


def test_networks_of_a_comparison_have_equal_parameters_and_steps(tiny):
    arms = comparison_arms(tiny)
    assert [arm.name for arm in arms] == ["hybrid", "gqa", "v32", "mamba2", "kimi"]
    assert all(key.startswith("model.") for arm in arms for key in changed(tiny, arm))
    assert {total_steps(arm.recipe) for arm in arms} == {total_steps(tiny)}
    warms_up = {arm.name: any(s.warms_up for s in curriculum(arm.recipe)) for arm in arms}
    assert warms_up == {"hybrid": True, "gqa": False, "v32": True, "mamba2": False, "kimi": False}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"small": {"preset": "small"}}, r"compare\.arms\.small: has 35,.* parameters, \+2.*% of the hybrid's 1,"),
        ({"x": {"preset": "tinny"}}, r"compare\.arms\.x\.preset: unknown preset 'tinny'"),
        ({"x": {"layers": ["gqb"]}}, r"compare\.arms\.x\.layers: 'gqb' is not one of"),
        ({"hybrid": {"preset": "tiny"}}, "'hybrid' is the recipe's own model"),
        ({}, r"compare\.arms: is empty"),
    ],
)
def test_other_networks_are_refused(tiny, models, message):
    with pytest.raises(ConfigError, match=message):
        comparison_arms(with_overrides(tiny, {"compare.arms": models}))


def test_a_rate_multiplies_all_learning_rates(tiny):
    changed = with_rate(tiny, 0.5).train.optimizer
    assert (changed.learning_rate, changed.adamw_learning_rate) == (4e-3, 2.5e-3)
    assert changed.indexer_learning_rate is None


def test_equal_flops_change_the_steps_only(tiny):
    plain = with_overrides(tiny, {"model.hyper_connections": False})
    budget = training_flops(tiny)
    longer = with_flops(plain, budget)
    assert total_steps(longer) > total_steps(plain)
    assert training_flops(longer) == pytest.approx(budget, rel=0.01)
    assert with_flops(tiny, budget).train.stages == tiny.train.stages


def test_the_waterfall_goes_from_none_to_all(tiny):
    stages = cost_stages(tiny)
    assert list(stages) == ["none", *CHOICES]
    assert stages["qat"] == tiny.model
    assert set(stages["none"].layers) == {"gqa"} and not stages["none"].qat
    assert stages["attention"].layers == tiny.model.layers and stages["attention"].kv_format == "bf16"


def test_the_recipe_of_the_evidence_has_all_arms():
    recipe = load_recipe(["configs/evidence.yaml"])
    assert [arm.name for arm in ablation_arms(recipe)] == ["full", *CHOICES, "none"]
    assert [arm.name for arm in comparison_arms(recipe)] == ["hybrid", "gqa", "gqa-conv", "v32", "mamba2", "kimi"]
