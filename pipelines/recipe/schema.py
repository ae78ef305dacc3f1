"""The recipe: every number a run depends on, read from YAML files and the command line.

``python -m pipelines <step> --config a.yaml [--config b.yaml] [--section.key value]``: later files win over earlier
ones, the command line wins over all. Unknown keys, wrong types and values out of range are refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator
from yaml import YAMLError

from model.config import ModelConfig
from model.errors import ConfigError
from model.execution import Mode
from model.muon import OptimizerConfig

Share = Annotated[float, Field(ge=0, le=1)]


def _setting(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("a sweep tries numbers, words, true and false")
    return value


def _dotted(space: Any, prefix: str = "") -> Any:
    """Nested mappings, as from ``--sweep.space.model.csa_ratio '[4, 8]'``, as one of dotted keys."""
    if not isinstance(space, dict):
        return {prefix: space} if prefix else space
    return {
        key: value
        for name, inner in space.items()
        for key, value in _dotted(inner, f"{prefix}.{name}".strip(".")).items()
    }


Setting = Annotated[bool | int | float | str, BeforeValidator(_setting)]
"""What a sweep can try of a key."""


_STARTING_POINTS = ("model.preset", "model.depth")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives: ``<folder>/<name>`` for its own files, ``<folder>`` for data and tracking."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "hybrid"
    folder: Path = Path("runs")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    @field_validator("name")
    @classmethod
    def _not_taken(cls, name: str) -> str:
        if name in ("data", "sweeps", "mlartifacts"):
            raise ValueError(f"run.folder keeps other things in '{name}'")
        return name


class DataSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "stdlib"
    sources: tuple[str, ...] = ()
    """Globs of .txt, .md, .py, .jsonl and .parquet files; empty means the running Python's standard library."""
    text_field: str = "text"
    """The field of .jsonl records and the column of .parquet files that hold the text."""
    tokenizer: str = "byte"
    """``byte``, or the path of a Hugging Face ``tokenizer.json``."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    packing: bool = True
    """Fill rows with several short documents, masked from one another; without, a row holds one and padding."""
    max_text_bytes: Annotated[int, Field(ge=1)] | None = None
    """Stop reading sources after this many bytes of text; None reads everything."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents, chosen by a hash of their content, kept for validation."""
    retrieval_share: Share = 0.5
    """Share of all training rows that are generated retrieval documents."""
    needle_share: Share = 0.25
    """Of the retrieval documents, the share that plants one needle in text; the others hold many key-value pairs."""
    pairs: Annotated[int, Field(ge=1)] = 8
    """Key-value pairs in a key-value recall document. Training documents draw their number from 2 up to this."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """How often a training document asks all its pairs, at most; drawn from 1 up to this. Answers per step decide how
    soon recall is learned. Validation documents ask once."""
    retrieval_lengths: tuple[Annotated[int, Field(ge=8)], ...] = ()
    """Lengths in tokens of the generated training documents, each as likely; empty: all of ``sequence_length``. Stages
    of shorter sequences leave out the documents that do not fit."""
    retrieval_validation_documents: Annotated[int, Field(ge=1)] = 512
    shard_tokens: Annotated[int, Field(ge=1024)] = 4_000_000
    """A shard is closed once it holds this many tokens. Readers hold one in memory, and pack rows within it."""
    seed: int = 1234

    def content(self) -> dict[str, Any]:
        """What the shards' content depends on, as plain JSON values; on the tokenizer it does by its file."""
        return self.model_dump(mode="json", exclude={"name", "tokenizer"})


class StageSection(Section):
    """One part of the curriculum; what it leaves out is as elsewhere in the recipe."""

    attention: Literal["dense", "indexer_warmup", "sparse"] = "sparse"
    """dense: csa layers attend to every visible entry. indexer_warmup: the same, only the indexer learns.
    sparse: csa layers attend to the indexer's choice."""
    steps: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    """How long the stage is: optimizer steps, or the tokens that its whole steps may take."""
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    batch_rows: Annotated[int, Field(ge=1)] | None = None
    index_topk: Annotated[int, Field(ge=1)] | None = None
    qat: bool | None = None
    """Whether the cache formats and FP4 experts are in the loop (``model.qat``)."""
    learning_rate_scale: Annotated[float, Field(gt=0)] = 1.0
    indexer_learning_rate: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> StageSection:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("a stage has either steps or tokens")
        return self


class AnticipatorySection(Section):
    """For some updates after a roll-back, routers of older weights choose the experts
    (:mod:`pipelines.training.anticipatory_routing`)."""

    lag: Annotated[int, Field(ge=1)] = 8
    """How many updates older."""
    steps: Annotated[int, Field(ge=1)] = 200
    """For how many updates. Each costs a forward pass more."""


class StabilitySection(Section):
    """What happens where a gradient is not finite, or the loss leaps up."""

    action: Literal["skip", "roll_back", "stop"] = "skip"
    """skip leaves the batch out. roll_back goes back to the weights and the optimizer of the last checkpoint, which it
    keeps in memory, and on with the batches that follow. stop ends the run."""
    spike: Annotated[float, Field(gt=0)] | None = 2.0
    """A leap: by so many nats per token above the median of the last ``window`` losses of the stage, once there are
    half as many; None looks only for what is not finite."""
    window: Annotated[int, Field(ge=4)] = 32
    max_interventions: Annotated[int, Field(ge=0)] = 3
    """How often a run goes on; the next time it ends."""
    anticipatory_routing: AnticipatorySection | None = None
    """None leaves it out."""

    @model_validator(mode="after")
    def _routes_after_a_roll_back(self) -> StabilitySection:
        if self.anticipatory_routing is not None and self.action != "roll_back":
            raise ValueError("anticipatory_routing follows a roll-back, which needs action: roll_back")
        return self


class TrainSection(Section):
    workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    threads_per_worker: Annotated[int, Field(ge=1)] = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often Ray Train restarts the workers from the last checkpoint."""
    init_from: Path | None = None
    """A checkpoint folder whose weights training starts from. Position biases of a compressor whose ratio differs
    start at zero; every other shape must agree."""
    sharding: Literal["none", "fsdp"] = "none"
    """Where there are several workers. none: each holds the whole network. fsdp: each holds a share of the matrices and
    of their optimizer state, and gathers a layer's while it runs; under BF16 autocast in BF16, unless a stage
    rounds experts to FP4, which then starts from float32."""
    batch_rows: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step, summed over the workers."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward and backward passes, of as many rows each, that make up one optimizer step."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)] = (StageSection(steps=100),)
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    final_lr_share: Share = 0.1
    """The learning rate falls along a cosine to this share of its peak over the last ``decay_share`` of all steps."""
    decay_share: Share = 0.4
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    indexer_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    balance_loss_weight: Annotated[float, Field(ge=0)] = 1e-4
    router_bias_speed: Annotated[float, Field(ge=0)] = 1e-3
    mtp_loss_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the multi-token prediction loss, for models with ``mtp_layers`` (report 4.2.2)."""
    mtp_decay_loss_weight: Annotated[float, Field(ge=0)] = 0.1
    """The same once the learning rate has begun to fall."""
    answer_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of an answer token's loss against a text token's."""
    context_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the other tokens of a retrieval document: 0 learns only to answer from them."""
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    """Data type of matrix products; the state, norms and softmaxes stay in float32. auto is bfloat16 where rank 0's
    machine multiplies it faster than float32, else none. A resumed run keeps the choice (``compute_dtype.json`` in its
    checkpoints), and all trials of a sweep share one. ``optimizer.ns_dtype`` likewise."""
    recompute: bool = False
    """Keep only the layers' inputs for the backward pass and compute what is within them again: less memory, about a
    third more work, the same gradients."""
    log_every: Annotated[int, Field(ge=1)] = 5
    validate_every: Annotated[int, Field(ge=1)] = 50
    """Steps from one validation to the next; where a stage ends, there is one, and a checkpoint, in any case."""
    validation_rows: Annotated[int, Field(ge=1)] = 128
    """Rows of each kind (text, key-value recall, needles) that one validation reads."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    optimizer: OptimizerConfig = OptimizerConfig()
    stability: StabilitySection = StabilitySection()

    @model_validator(mode="after")
    def _shards_among_workers(self) -> TrainSection:
        if self.sharding == "fsdp" and self.workers == 1:
            raise ValueError("sharding: fsdp divides the network among workers, and there is only one")
        return self


class SweepSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "sweep"
    space: Annotated[dict[str, list[Setting]], BeforeValidator(_dotted)] = Field(default_factory=dict)
    """Dotted recipe keys and the values to try, e.g. ``model.csa_ratio: [4, 8]``. A later file's takes the place of an
    earlier one's."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """How many random combinations to try; None tries the whole grid."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe keys that every trial changes, e.g. a shorter curriculum."""
    in_process: bool = True
    """Train in the trial's own process; False gives each trial Ray Train workers of its own."""
    max_concurrent: Annotated[int, Field(ge=1)] = 2
    grace_validations: Annotated[int, Field(ge=1)] = 1
    """Validations before ASHA may stop a trial."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    metric: str = "validation/loss"
    mode: Literal["min", "max"] = "min"
    max_cache_bytes_per_token: Annotated[float, Field(gt=0)] | None = None
    """The winner is the best trial whose cache fits this budget; None sets no budget."""


class EvaluateSection(Section):
    checkpoint: Path | None = None
    """A checkpoint folder; None takes the final checkpoint of ``run.name``."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("mqar", "needle")
    lengths: Annotated[tuple[Annotated[int, Field(ge=32)], ...], Field(min_length=1)] = (256,)
    """Document lengths in tokens."""
    depths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.5, 0.9)
    """Where the needle stands, as a share of the way from the document's start to its last allowed place."""
    samples: Annotated[int, Field(ge=1)] = 64
    """Documents per task, length and depth."""
    seed: int = 4321


class CompareSection(Section):
    qat: tuple[Path, ...] = ()
    """Checkpoint folders of networks trained with ``model.qat``."""
    plain: tuple[Path, ...] = ()
    """In the same order, those of the same networks trained without; pairs of several seeds give a spread."""


class PromoteSection(Section):
    registered_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "fiftyfold"
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = "champion"
    metric: str = "eval/recall"
    mode: Literal["min", "max"] = "max"
    """Whether the best run has the lowest or the highest ``metric``."""
    max_cache_bytes_per_token: Annotated[float, Field(gt=0)] | None = None


class ServeSection(Section):
    model_uri: str = "models:/fiftyfold@champion"
    host: Literal["127.0.0.1", "localhost", "::1"] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    threads_per_replica: Annotated[int, Field(ge=1)] = 1
    execution: Mode = "auto"
    """auto takes the fastest operators of the machine; batch-invariant gives a request the same bits whatever else is
    asked and however its prompt is read."""
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the matrices; auto is bfloat16 where a replica's machine multiplies it faster than float32."""
    max_active_requests: Annotated[int, Field(ge=1)] = 16
    """Requests decoded together; further ones wait."""
    max_waiting_requests: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait; beyond that the answer is 429."""
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8_000_000
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0


class DemoSection(Section):
    baseline: Path = Path("configs/baseline.yaml")
    """The recipe file that, over the demo's own, makes the baseline."""
    keep_serving: bool = False
    """Go on answering requests after the table, until Ctrl-C."""
    questions: Annotated[int, Field(ge=1)] = 8
    """Recall questions to ask over HTTP; the first one is shown."""
    least_recall: Share = 0.9
    """The demo fails when the champion's recall at the training length is less."""


class TrackingSection(Section):
    uri: str | None = None
    """MLflow tracking URI; None is an SQLite file in ``run.folder``."""
    experiment: str = "fiftyfold"


def _model_config(value: Any) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"model: expected a mapping, found {value!r}")
    return ModelConfig.from_dict(value)


class Recipe(Section):
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: Annotated[ModelConfig, BeforeValidator(_model_config), PlainSerializer(ModelConfig.to_dict)] = ModelConfig()
    train: TrainSection = TrainSection()
    sweep: SweepSection = SweepSection()
    evaluate: EvaluateSection = EvaluateSection()
    compare: CompareSection = CompareSection()
    promote: PromoteSection = PromoteSection()
    serve: ServeSection = ServeSection()
    demo: DemoSection = DemoSection()
    tracking: TrackingSection = TrackingSection()

    # ModelConfig is a plain dataclass (model/ depends on torch alone), which pydantic must not re-validate.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), arbitrary_types_allowed=True, revalidate_instances="never"
    )

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def data_folder(self) -> Path:
        return self.run.folder / "data" / self.data.name

    @property
    def sweep_folder(self) -> Path:
        return self.run.folder / "sweeps" / self.sweep.name

    @property
    def final_checkpoint(self) -> Path:
        return self.run_folder / "final"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and for :func:`recipe_from_dict`."""
        return self.model_dump(mode="json")


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Merge YAML ``files`` and ``key=value`` ``overrides`` into a validated recipe. Raises ConfigError."""
    return _merge(OmegaConf.create({}), files, overrides)


def over(recipe: Recipe, file: str | Path) -> Recipe:
    """``recipe`` with the settings of a YAML file over its own; a preset there is refused. Raises ConfigError."""
    for key in _STARTING_POINTS:
        if OmegaConf.select(_read(file), key) is not None:
            raise ConfigError(f"{file}: {key}: cannot be changed here, because every field of the model is set already")
    return _merge(OmegaConf.create(recipe.to_dict()), [file], [])


def _read(file: str | Path) -> Any:
    try:
        content = OmegaConf.load(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"{file}: expected a mapping of sections at the top level")
    return content


def _merge(merged: Any, files: Sequence[str | Path], overrides: Sequence[str]) -> Recipe:
    for file in files:
        try:
            merged = _over(merged, _read(file))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError(f"{file}: does not fit what came before ({' '.join(str(error).split())})") from error
    for override in overrides:  # one by one first, to name the one that is wrong
        try:
            _over(merged.copy(), OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            key, _, value = override.partition("=")
            raise ConfigError(f"{key}: cannot be set to {value!r} ({' '.join(str(error).split())})") from error
    try:
        merged = _over(merged, OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"command line: {' '.join(str(error).split())}") from error
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe: {' '.join(str(error).split())}") from error
    return recipe_from_dict(values)


def _over(earlier: Any, later: Any) -> Any:
    """``later`` merged over ``earlier``, where a starting point of the model, and a sweep's space, take the place of
    another."""
    if OmegaConf.select(later, "sweep.space") is not None and OmegaConf.select(earlier, "sweep.space"):
        del earlier.sweep.space
    for given, replaced in (("depth", "preset"), ("preset", "depth")):
        if OmegaConf.select(later, f"model.{given}") is not None and OmegaConf.select(earlier, f"model.{replaced}"):
            del earlier.model[replaced]
    return OmegaConf.merge(earlier, later)


def recipe_from_dict(values: Any) -> Recipe:
    """Validate plain values. Raises ConfigError with one line per offending key."""
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(map(_sentence, _causes(error)))) from None
    if not recipe.run.folder.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"run.folder: '{recipe.run.folder}' is relative, and a submitted job works in a temporary copy of the "
            "project; pass --run.folder with an absolute path"
        )
    # Ray workers run in folders of their own, so the recipe that travels to them names absolute paths.
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"folder": recipe.run.folder.absolute()}),
            "train": recipe.train.model_copy(update={"init_from": _absolute(recipe.train.init_from)}),
            "compare": recipe.compare.model_copy(
                update={name: tuple(map(Path.absolute, getattr(recipe.compare, name))) for name in ("qat", "plain")}
            ),
            "evaluate": recipe.evaluate.model_copy(update={"checkpoint": _absolute(recipe.evaluate.checkpoint)}),
        }
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def with_overrides(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """A copy of ``recipe`` with dotted keys replaced, validated again. Raises ConfigError."""
    base = OmegaConf.create(recipe.to_dict())
    for key, value in overrides.items():
        if key in _STARTING_POINTS:
            raise ConfigError(f"{key}: cannot be changed here, because every field of the model is set already")
        OmegaConf.update(base, key, value, merge=False)
    return recipe_from_dict(OmegaConf.to_container(base))


def _causes(error: pydantic.ValidationError) -> list[Any]:
    """Without those that follow from others: a list whose items are wrong also counts as too short."""
    errors = error.errors()
    wrong = {item["loc"][:n] for item in errors for n in range(len(item["loc"]))}
    return [item for item in errors if not (item["type"] == "too_short" and item["loc"] in wrong)]


def _sentence(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(item["loc"][-1]), _names_beside(item["loc"]), n=1)
        return f"{key}: unknown key" + (f"; did you mean '{close[0]}'?" if close else "")
    message = item["msg"].removeprefix("Value error, ")
    whole_section = isinstance(item["input"], dict)
    return f"{key}: {message}" if whole_section else f"{key}: {message}, found {item['input']!r}"


def _names_beside(place: tuple[int | str, ...]) -> list[str]:
    """The keys that there are where ``place``, a path into the recipe, ends."""
    section: Any = Recipe
    for part in place[:-1]:
        found = _fields(section)[part] if isinstance(part, str) else section
        kinds = (found, *get_args(found), *(kind for inner in get_args(found) for kind in get_args(inner)))
        section = next((kind for kind in kinds if _fields(kind)), None)
    return list(_fields(section))


def _fields(section: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(section):
        return get_type_hints(section)
    return {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}
