"""Arms of the experiments: recipes by name, derived from one recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from kernels.cache_io import FORMAT_BITS
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import ConfigError
from model.mixers.gqa import GroupedQueryAttention
from model.transformer import Transformer
from pipelines.experiments.flops import training_flops
from pipelines.recipe.experiments import Choice
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.training.curriculum import curriculum

CHOICES: tuple[str, ...] = get_args(Choice)
FULL, NONE, HYBRID = "full", "none", "hybrid"
"""Names of the ablation's two ends and of the recipe's own arm in a comparison."""
TITLES = {
    FULL: "all five",
    "attention": "GQA for hybrid attention",
    "precision": "BF16 for mixed precision",
    "muon": "AdamW for Muon",
    "hyper_connections": "plain residuals for mHC",
    "qat": "quantized after, for QAT",
    NONE: "none of the five",
}


@dataclass(frozen=True)
class Arm:
    """A recipe to train."""

    name: str
    title: str
    recipe: Recipe
    scored: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model to change after training, before scores."""


def dense_stages(recipe: Recipe) -> Recipe:
    """Return the recipe with dense attention in every stage, for a model without indexers."""
    stages = [
        {**stage, "attention": "dense", "index_topk": None, "indexer_learning_rate": None}
        for stage in recipe.to_dict()["train"]["stages"]
    ]
    return with_overrides(recipe, {"train.stages": stages})


def _with_model(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.replace(**changes)})


def _without_attention(recipe: Recipe) -> Recipe:
    gqa = GroupedQueryAttention.name
    layers, options = (gqa,) * recipe.model.num_layers, {gqa: recipe.ablate.gqa_options}
    try:
        return dense_stages(_with_model(recipe, layers=layers, mixer_options=options))
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"mixer_options.{gqa}", "ablate.gqa_options", 1)) from None


def _without_precision(recipe: Recipe) -> Recipe:
    return _with_model(recipe, **dict.fromkeys(CACHE_FORMATS, "bf16"))


def _without_muon(recipe: Recipe) -> Recipe:
    return with_overrides(recipe, {"train.optimizer.rule": "adamw"})


def _without_qat(recipe: Recipe) -> Recipe:
    stages = [{**stage, "qat": None} for stage in recipe.to_dict()["train"]["stages"]]
    return with_overrides(_with_model(recipe, qat=False), {"train.stages": stages})


WITHOUT: dict[str, Callable[[Recipe], Recipe]] = {
    "attention": _without_attention,
    "precision": _without_precision,
    "muon": _without_muon,
    "hyper_connections": lambda recipe: _with_model(recipe, hyper_connections=False),
    "qat": _without_qat,
}
"""Functions that take one choice away from a recipe."""


def uses(recipe: Recipe, choice: str) -> bool:
    """Return whether the recipe makes a choice."""
    model = recipe.model
    used = {role for mixer in model.mixers for role in mixer.formats}
    return {
        "attention": any(mixer is not GroupedQueryAttention for mixer in model.mixers),
        "precision": any(FORMAT_BITS[getattr(model, role)] < 16 for role in CACHE_FORMATS if role in used),
        "muon": recipe.train.optimizer.rule == "muon",
        "hyper_connections": model.hyper_connections,
        "qat": model.qat,
    }[choice]


def ablation_arms(recipe: Recipe) -> list[Arm]:
    """Return the full recipe, it without each of ``ablate.choices``, it without all five, and the variants.

    The network without QAT is scored with the quantization of the full recipe. Raises ConfigError if the recipe does
    not make a choice, and for a variant that is not a recipe.
    """
    section = recipe.ablate
    arms = [Arm(FULL, TITLES[FULL], recipe)]
    choices: tuple[str, ...] = section.choices
    for choice in choices:
        if not uses(recipe, choice):
            raise ConfigError(f"ablate.choices: the recipe does not use {choice}, so it cannot be taken away")
        scored = {"qat": True} if choice == "qat" else {}
        arms.append(Arm(choice, TITLES[choice], WITHOUT[choice](recipe), scored))
    if set(choices) == set(CHOICES):
        nothing = recipe
        for choice in CHOICES:
            nothing = WITHOUT[choice](nothing)
        arms.append(Arm(NONE, TITLES[NONE], nothing))
    for name, changes in section.variants.items():
        if name in TITLES:
            raise ConfigError(f"ablate.variants: '{name}' is the name of an arm of the ablation")
        try:
            arms.append(Arm(name, name, with_overrides(recipe, changes)))
        except ConfigError as error:
            raise ConfigError(f"ablate.variants.{name}: {error}") from None
    if len(arms) == 1:
        raise ConfigError("ablate: neither ablate.choices nor ablate.variants names an arm")
    return arms


def comparison_arms(recipe: Recipe) -> list[Arm]:
    """Return the recipe's own model as ``hybrid``, and a recipe per model of ``compare.arms``.

    Raises ConfigError for a model that cannot be built, or whose parameters are not as many as the hybrid's.
    """
    section = recipe.compare
    arms = [Arm(HYBRID, HYBRID, recipe)]
    own = _count(recipe.model)
    for name, values in section.arms.items():
        if name == HYBRID:
            raise ConfigError(f"compare.arms: '{HYBRID}' is the recipe's own model")
        try:
            # The tasks place facts outside the window, so documents are equal only with equal windows.
            shared = {"vocab_size": recipe.model.vocab_size, "window": recipe.model.window}
            model = ModelConfig.from_dict(values).replace(**shared)
        except ConfigError as error:
            raise ConfigError(f"compare.arms.{name}.{error}") from None
        count = _count(model)
        if abs(count / own - 1) > section.parameter_tolerance:
            raise ConfigError(
                f"compare.arms.{name}: has {count:,} parameters, {count / own - 1:+.1%} of the hybrid's {own:,}, but "
                f"compare.parameter_tolerance is {section.parameter_tolerance:.0%}"
            )
        changed = recipe.model_copy(update={"model": model})
        arms.append(Arm(name, name, changed if model.indexed_layers else dense_stages(changed)))
    if len(arms) == 1:
        raise ConfigError("compare.arms: is empty")
    return arms


def _count(model: ModelConfig) -> int:
    return Transformer.on_meta(model).num_parameters()


def with_rate(recipe: Recipe, rate: float) -> Recipe:
    """Return the recipe with its learning rates multiplied by ``rate``."""
    optimizer = recipe.train.optimizer
    keys = ("learning_rate", "adamw_learning_rate", "indexer_learning_rate")
    rates = {key: getattr(optimizer, key) for key in keys}
    changes = {f"train.optimizer.{key}": value * rate for key, value in rates.items() if value is not None}
    return with_overrides(recipe, changes)


def with_flops(recipe: Recipe, flops: float) -> Recipe:
    """Return the recipe with the steps of every stage scaled such that training costs ``flops``, at least one each."""
    factor = flops / training_flops(recipe)
    stages = recipe.to_dict()["train"]["stages"]
    for stage, planned in zip(stages, curriculum(recipe)):
        stage |= {"steps": max(1, round(planned.steps * factor)), "tokens": None}
    return with_overrides(recipe, {"train.stages": stages})
