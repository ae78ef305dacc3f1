"""Recipe sections of the experiments: sweep, ablation, comparison and report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from pipelines.recipe.metrics import LOSS
from pipelines.recipe.section import MAX_LENGTH, Distinct, Section
from pipelines.recipe.text_types import Name, RecipeKey, Text

_Integer = Annotated[int, Field(strict=True)]
_Positive = Annotated[float, Field(gt=0)]


def _check_setting(value: Any) -> Any:
    names = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if not names and not isinstance(value, bool | int | float | str):
        raise ValueError("expected a number, text, true or false, or a list of names")
    return value


class Range(Section):
    """Values of a sweep's key between two bounds, both included."""

    log_uniform: tuple[float, float] | None = None
    """Numbers whose logarithm is uniform."""
    uniform: tuple[float, float] | None = None
    int: tuple[_Integer, _Integer] | None = None
    """Whole numbers."""

    @property
    def bounds(self) -> tuple[float, float]:
        return self.log_uniform or self.uniform or self.int or (0, 0)

    @model_validator(mode="after")
    def _check_bounds(self) -> Range:
        if sum(value is not None for _, value in self) != 1:
            given = [name for name, value in self if value is not None]
            raise ValueError(f"expected one of log_uniform, uniform and int, found {' and '.join(given) or 'none'}")
        low, high = self.bounds
        if low >= high:
            raise ValueError(f"the lower bound {low:g} is not below the upper bound {high:g}")
        if self.log_uniform and low <= 0:
            raise ValueError(f"log_uniform: expected bounds above 0, found {low:g}")
        return self


def _flatten_keys(space: Any, prefix: str = "") -> Any:
    """Flatten nested mappings, as from ``--sweep.space.model.csa_ratio '[4, 8]'``, to dotted keys. A range, such as
    ``{log_uniform: [1e-3, 1e-1]}``, stays a mapping."""
    if not isinstance(space, dict) or (prefix and set(space) & {*Range.model_fields, "choice"}):
        return {prefix: space} if prefix else space
    return {
        key: value
        for name, inner in space.items()
        for key, value in _flatten_keys(inner, f"{prefix}.{name}".strip(".")).items()
    }


Setting = Annotated[bool | int | float | str | list[str], BeforeValidator(_check_setting)]
"""A value of a recipe key that a sweep can try. A list of names is a layer schedule."""


_SETTINGS: TypeAdapter[list[Setting]] = TypeAdapter(Annotated[list[Setting], Field(min_length=1), Distinct])


def _read_values(values: Any) -> list[Setting] | Range:
    """Return the values of a key. The kind is known before they are validated, so that messages name one kind only."""
    if isinstance(values, Range):
        return values
    if isinstance(values, dict) and set(values) != {"choice"}:
        return Range.model_validate(values)
    return _SETTINGS.validate_python(values["choice"] if isinstance(values, dict) else values)


class SweepSection(Section):
    name: Name = "sweep"
    space: Annotated[
        dict[RecipeKey, Annotated[list[Setting] | Range, BeforeValidator(_read_values)]], BeforeValidator(_flatten_keys)
    ] = Field(default_factory=dict)
    """Dotted recipe keys and the values to try: a list, e.g. ``model.csa_ratio: [4, 8]``, or a range, e.g.
    ``train.optimizer.learning_rate: {log_uniform: [1.0e-3, 1.0e-1]}`` (:class:`Range`). The space of a later file
    replaces that of an earlier one."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Number of combinations to try. None tries the whole grid; a space with a range needs a number."""
    search: Literal["random", "optuna"] | None = None
    """random: combinations are drawn at random before the first trial. optuna: Optuna's TPE proposes each trial after
    the earlier ones. None: random for lists, optuna for a space with a range."""
    overrides: Annotated[dict[RecipeKey, Any], BeforeValidator(_flatten_keys)] = Field(default_factory=dict)
    """Dotted recipe keys to change in every trial, e.g. for a shorter curriculum."""
    in_process: bool = True
    """Train in the trial's own process. False gives each trial Ray Train workers of its own."""
    cpus_per_trial: _Positive = 1.0
    """CPUs of a trial that trains in its own process."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of trials at a time; fewer if the cluster has too few logical CPUs. None fills the cluster at
    RAY_ADDRESS, or this machine's cores."""
    grace_validations: Annotated[int, Field(ge=1)] = 1
    """Validations before ASHA may stop a trial."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    metric: Text = LOSS
    mode: Literal["min", "max"] = "min"
    evaluate_front: bool = False
    """Score the points on the Pareto front on the tasks and lengths of the evaluate section, for the verdict."""
    max_cache_bytes_per_token: _Positive | None = None
    """Cache budget of the winner. None sets no budget. Refused, before any trial, if no point of the space fits."""


class ExperimentSection(Section):
    """Settings of a comparison of arms. Each arm is a recipe that is trained with several seeds."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1), Distinct] = (0, 1, 2)
    """Seeds of the weights and of the order of the data. The first one selects the learning rates. Intervals and tests
    need three."""
    rates: Annotated[tuple[_Positive, ...], Field(min_length=1), Distinct] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Multiples of the recipe's learning rates (``learning_rate``, ``adamw_learning_rate`` and
    ``indexer_learning_rate``) to try first. The same for every arm."""
    further_rates: Annotated[int, Field(ge=0)] = 2
    """Maximum number of rates to try beyond the edge of ``rates`` if an arm's best rate is there. The ratio of a new
    rate to the edge is that of the edge to its neighbor."""
    cpus_per_trial: _Positive = 1.0
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of trials at a time; fewer if the cluster has too few logical CPUs. None fills the cluster at
    RAY_ADDRESS, or this machine's cores."""


Choice = Literal["attention", "precision", "muon", "hyper_connections", "qat"]
"""One of the five choices of the recipe."""


class AblateSection(ExperimentSection):
    name: Name = "ablation"
    choices: tuple[Choice, ...] = ("attention", "precision", "muon", "hyper_connections", "qat")
    """Choices to take away, each alone. With all five, another arm makes none of them."""
    gqa_options: dict[Text, Any] = Field(default_factory=dict)
    """``mixer_options.gqa`` of the arms without hybrid attention."""
    variants: dict[Name, Annotated[dict[RecipeKey, Any], BeforeValidator(_flatten_keys)]] = Field(default_factory=dict)
    """Further arms by name: dotted recipe keys to change."""
    equal_flops: bool = True
    """Also train arms whose steps cost more or fewer FLOPs for as many FLOPs as the full recipe."""
    context: Annotated[int, Field(ge=1, le=MAX_LENGTH)] = 65_536
    """Sequence length in tokens at which cache bytes and FLOPs are measured."""


class CompareSection(ExperimentSection):
    name: Name = "comparison"
    arms: dict[Name, dict[str, Any]] = Field(
        default_factory=lambda: {
            "gqa": {"preset": "tiny-gqa"},
            "v32": {"preset": "tiny-v32"},
            "mamba2": {"preset": "tiny-mamba2"},
            "kimi": {"preset": "tiny-kimi"},
        }
    )
    """``model`` sections by name. They stand beside the recipe's own model, the arm ``hybrid``."""
    parameter_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Largest difference of an arm's parameters from the hybrid's, as a share."""
    timed_lengths: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_LENGTH)], ...], Field(min_length=1)] = (
        1024,
        8192,
        65_536,
    )
    """Sequence lengths at which decoding and prefill are timed."""
    timed_prefill: Annotated[int, Field(ge=1)] = 8192
    """Longest prompt whose prefill is timed."""
    max_measured_bytes: Annotated[int, Field(ge=1)] = 1 << 29
    """Largest cache to allocate and fill in order to measure it."""


class ReportSection(Section):
    ablate: Text | None = None
    """MLflow run id. None: the newest finished run of the step."""
    compare: Text | None = None
    sweep: Text | None = None
    name: Name = "report"
    """Folder in ``run.folder``/experiments for the HTML file and the figures."""
