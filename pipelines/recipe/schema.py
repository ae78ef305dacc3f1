"""The recipe schema: every number that a run depends on, with its type, bounds and default.

:mod:`pipelines.recipe.experiments` has the sections of the experiments. :mod:`pipelines.recipe.loading` reads recipes
from YAML files and the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from model.config import ModelConfig
from model.errors import ConfigError
from model.optim import OptimizerConfig
from model.wording import quote
from pipelines.recipe.experiments import AblateSection, CompareSection, ReportSection, SweepSection
from pipelines.recipe.paths import (
    LocalPath,
    ModelUri,
    PathText,
    SourcePattern,
    TokenizerSource,
    TrackingUri,
    without_password,
)
from pipelines.recipe.section import MAX_LENGTH, Section, Share
from pipelines.recipe.text_types import Alias, Name, PrintableText, Text
from serve.api.config import Host
from serve.config import ServerConfig


def _name_optimizer(value: Any, validate: ValidatorFunctionWrapHandler) -> OptimizerConfig:
    """Add the section to errors of the optimizer's own checks, which name the field only."""
    try:
        return validate(value)
    except ConfigError as error:
        raise ConfigError(f"train.optimizer.{error}") from None


class RunSection(Section):
    """Location of a run: ``<folder>/<name>`` for its own files, ``<folder>`` for data and tracking."""

    name: Name = "hybrid"
    folder: LocalPath = Path("runs")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0

    @field_validator("name")
    @classmethod
    def _check_not_reserved(cls, name: str) -> str:
        if name in ("data", "sweeps", "experiments", "mlartifacts", "served") or name.startswith("mlflow.db"):
            raise ValueError("expected a name that is not reserved in run.folder")
        return name


class DataSection(Section):
    name: Name = "stdlib"
    sources: tuple[SourcePattern, ...] = ()
    """Paths or globs of .txt, .md, .py, .jsonl and .parquet files. Empty: the standard library of the running
    Python."""
    text_field: Text = "text"
    """Text field of .jsonl records and text column of .parquet files."""
    tokenizer: TokenizerSource = "byte"
    """``byte``, or the path of a Hugging Face ``tokenizer.json``."""
    bos_token: Text | None = None
    """Token that begins documents and prompts. None: as declared beside the tokenizer (docs/text.md)."""
    eos_token: Text | None = None
    """Token that ends documents. None: as declared beside the tokenizer."""
    vocabulary: Literal["tokenizer", "model"] = "tokenizer"
    """Size of the network's vocabulary. tokenizer: that of the tokenizer, whatever the preset's. model:
    ``model.vocab_size``, which setting that key implies; it may exceed the tokenizer's size."""
    sequence_length: Annotated[int, Field(ge=8, le=MAX_LENGTH)] = 256
    packing: bool = True
    """Pack several short documents into a row, masked from one another. False: one document and padding per row."""
    max_text_bytes: Annotated[int, Field(ge=1)] | None = None
    """Maximum bytes of source text to read. None reads everything."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents held out for validation, chosen by a hash of their content."""
    retrieval_share: Share = 0.5
    """Share of training rows that are generated retrieval documents."""
    retrieval_tasks: dict[Text, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {"mqar": 0.75, "needle": 0.25}
    )
    """Evaluation tasks whose documents are generated, and the weight of each (docs/evaluation.md)."""
    task_settings: dict[Text, dict[Text, int | float]] = Field(default_factory=dict)
    """Settings of tasks, for generated documents and for the evaluation, e.g. ``multi_key: {keys: 4}``. Training
    documents draw them up to these."""
    pairs: Annotated[int, Field(ge=2)] = 8
    """Key-value pairs of an mqar document. Training documents draw their number from 2 up to this."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """Maximum number of times a training document asks for all its facts, drawn from 1 up to this. More answers per
    step teach recall sooner. Validation documents ask once."""
    retrieval_lengths: tuple[Annotated[int, Field(ge=8, le=MAX_LENGTH)], ...] = ()
    """Lengths in tokens of generated training documents, drawn uniformly. Empty: ``sequence_length``. Stages with
    shorter sequences skip documents that do not fit."""
    retrieval_distance: Annotated[int, Field(ge=0)] | None = None
    """Tokens between the last fact of a generated document and its first question. None: ``model.window``."""
    retrieval_validation_documents: Annotated[int, Field(ge=1)] = 512
    shard_tokens: Annotated[int, Field(ge=1024)] = 4_000_000
    """Tokens after which a shard is closed. Readers hold one shard in memory and pack rows within it."""
    seed: int = 1234

    def settings_of(self, task: str) -> dict[str, int | float]:
        """Return the settings of a task: ``task_settings``, and ``pairs`` for mqar."""
        return {**self.task_settings.get(task, {}), **({"pairs": self.pairs} if task == "mqar" else {})}

    @model_validator(mode="after")
    def _check_pairs_once(self) -> DataSection:
        if "pairs" in self.task_settings.get("mqar", {}):
            raise ValueError("task_settings: the pairs of mqar are set by data.pairs")
        return self

    def content(self) -> dict[str, Any]:
        """Return the settings that determine the shards' content, as plain JSON values.

        The tokenizer is left out: its file, not its path, determines the content. So are BOS and EOS, which may be
        declared or set, and the size of the network's vocabulary.
        """
        return self.model_dump(mode="json", exclude={"name", "tokenizer", "bos_token", "eos_token", "vocabulary"})


class StageSection(Section):
    """One stage of the curriculum. Settings left out default to those of the recipe."""

    attention: Literal["dense", "indexer_warmup", "sparse"] = "sparse"
    """dense: csa and dsa layers attend to every visible entry. indexer_warmup: dense attention, and only the indexer is
    trained. sparse: csa and dsa layers attend to the entries that the indexer selects."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of the stage."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Token budget of the stage, instead of ``steps``; rounded down to whole steps."""
    sequence_length: Annotated[int, Field(ge=8, le=MAX_LENGTH)] | None = None
    batch_rows: Annotated[int, Field(ge=1)] | None = None
    index_topk: Annotated[int, Field(ge=1)] | None = None
    qat: bool | None = None
    """Train with fake-quantized cache formats and FP4 experts (``model.qat``)."""
    learning_rate_scale: Annotated[float, Field(gt=0)] = 1.0
    indexer_learning_rate: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_one_length(self) -> StageSection:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"expected either steps or tokens, found {'neither' if self.steps is None else 'both'}")
        return self


class AnticipatorySection(Section):
    """Expert selection with older router weights after a rollback
    (:mod:`pipelines.training.anticipatory_routing`)."""

    lag: Annotated[int, Field(ge=1)] = 8
    """Age of the router weights in updates."""
    steps: Annotated[int, Field(ge=1)] = 200
    """Updates with older router weights after a rollback. Each costs an additional forward pass."""


class StabilitySection(Section):
    """Response to a non-finite gradient or a loss spike."""

    action: Literal["skip", "roll_back", "stop"] = "skip"
    """skip: drop the batch. roll_back: restore weights and optimizer from the last checkpoint, kept in memory, and
    continue with the next batch. stop: end the run."""
    spike: Annotated[float, Field(gt=0)] | None = 2.0
    """Spike threshold in nats per token above the median of the stage's last ``window`` losses; applies once half a
    window has been seen. None checks only for non-finite values."""
    window: Annotated[int, Field(ge=4)] = 32
    max_interventions: Annotated[int, Field(ge=0)] = 3
    """Interventions after which the next one ends the run."""
    anticipatory_routing: AnticipatorySection | None = None
    """None disables anticipatory routing."""

    @model_validator(mode="after")
    def _check_rolls_back(self) -> StabilitySection:
        if self.anticipatory_routing is not None and self.action != "roll_back":
            raise ValueError(f"anticipatory_routing: needs action roll_back, found {self.action}")
        return self


class TrainSection(Section):
    workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    threads_per_worker: Annotated[int, Field(ge=1)] = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of the workers by Ray Train from the last checkpoint."""
    init_from: LocalPath | None = None
    """Checkpoint folder to initialize weights from. Position biases of a compressor whose ratio differs start at zero;
    all other shapes must match."""
    sharding: Literal["none", "fsdp"] = "none"
    """Parallelism across workers. none: each worker holds the whole network. fsdp: matrices and their optimizer state
    are sharded and gathered layer by layer; in BF16 under BF16 autocast, unless a stage rounds experts to FP4, which
    needs float32."""
    batch_rows: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step, summed over the workers."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Microbatches of equal size per optimizer step."""
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)] = (StageSection(steps=100),)
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    final_lr_share: Share = 0.1
    """Final learning rate as a share of its peak. It falls along a cosine over the last ``decay_share`` of all
    steps."""
    decay_share: Share = 0.4
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    indexer_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    balance_loss_weight: Annotated[float, Field(ge=0)] = 1e-4
    router_bias_speed: Annotated[float, Field(ge=0)] = 1e-3
    mtp_loss_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the multi-token prediction loss, for models with ``mtp_layers`` (report 4.2.2)."""
    mtp_decay_loss_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the multi-token prediction loss during learning rate decay."""
    answer_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """Loss weight of an answer token, relative to a text token."""
    context_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Loss weight of the other tokens of a retrieval document. 0 trains on their answers only."""
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    """Data type of matrix products; state, norms and softmaxes stay in float32. auto: bfloat16 where rank 0's machine
    multiplies it faster than float32, else none. Resumed runs keep the choice (``compute_dtype.json`` in their
    checkpoints), and the trials of a sweep share one. ``optimizer.ns_dtype`` works likewise."""
    recompute: bool = False
    """Recompute activations within each layer in the backward pass: less memory, about a third more work, identical
    gradients."""
    log_every: Annotated[int, Field(ge=1)] = 5
    validate_every: Annotated[int, Field(ge=1)] = 50
    """Steps between validations. A stage always ends with a validation and a checkpoint."""
    validation_rows: Annotated[int, Field(ge=1)] = 128
    """Rows of each kind (text, and each task of ``data.retrieval_tasks``) per validation."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    optimizer: Annotated[OptimizerConfig, WrapValidator(_name_optimizer)] = OptimizerConfig()
    stability: StabilitySection = StabilitySection()

    @model_validator(mode="after")
    def _check_sharding(self) -> TrainSection:
        if self.sharding == "fsdp" and self.workers == 1:
            raise ValueError("sharding: fsdp needs several workers, but workers is 1")
        return self


class EvaluateSection(Section):
    checkpoint: LocalPath | None = None
    """Checkpoint folder. None: the final checkpoint of ``run.name``."""
    tasks: Annotated[tuple[Text, ...], Field(min_length=1)] = ("mqar", "needle")
    """Names of evaluation tasks (docs/evaluation.md). ``data.task_settings`` holds their settings."""
    lengths: Annotated[tuple[Annotated[int, Field(ge=32, le=MAX_LENGTH)], ...], Field(min_length=1)] = (256,)
    """Document lengths in tokens. The first one is the training length, which effective lengths refer to."""
    depths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.5, 0.9)
    """Positions of needles and of the ends of scored spans, from 0 at the start to 1 at the last position allowed."""
    distance: Annotated[int, Field(ge=0)] | None = None
    """Tokens between the last fact of a document and its first question. None: the model's stacked windows,
    ``layers * window``; less is refused. An equal distance gives models equal documents."""
    samples: Annotated[int, Field(ge=1)] = 64
    """Documents per task, length and depth."""
    seed: int = 4321


class PromoteSection(Section):
    registered_name: Name = "fiftyfold"
    alias: Alias = "champion"
    metric: Text = "eval/recall"
    mode: Literal["min", "max"] = "max"
    """Direction of the best ``metric``: lowest or highest."""
    max_cache_bytes_per_token: Annotated[float, Field(gt=0)] | None = None


class ServeSection(Section, ServerConfig):
    model_uri: ModelUri = "models:/fiftyfold@champion"
    """``models:/<name>@<alias>``, ``models:/<name>/<version>``, or a checkpoint folder. Clients use the registered
    name, or the last two parts of the folder's path."""
    models: dict[Name, ModelUri] = Field(default_factory=dict)
    """Further models by the names that clients use, each with a value like ``model_uri``. All have the same
    settings."""
    alias_poll_seconds: Annotated[float, Field(gt=0)] | None = 10.0
    """Seconds between polls of the registry for moved aliases. New replicas then replace the old ones. None serves the
    versions found at the start."""
    host: Host = "127.0.0.1"
    """Address to listen on. Addresses other than loopback ones need an API key."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_key_file: PathText | None = None


class DemoSection(Section):
    baseline: LocalPath = Path("configs/baseline.yaml")
    """Recipe file that turns the demo's recipe into the baseline."""
    keep_serving: bool = False
    """Keep serving after the final table, until Ctrl-C."""
    questions: Annotated[int, Field(ge=1)] = 8
    """Number of recall questions to ask over HTTP. The first is printed."""
    least_recall: Share = 0.9
    """Minimum recall of the champion at the training length; the demo fails below it."""


class TrackingSection(Section):
    uri: TrackingUri | None = None
    """MLflow tracking URI. None: an SQLite file in ``run.folder``."""
    experiment: PrintableText = "fiftyfold"
    system_metrics_interval: Annotated[float, Field(gt=0)] | None = 10.0
    """Seconds between samples of the machine's CPU, memory, disk, network and GPU use, logged with psutil. None logs
    none."""


def _parse_model_config(value: Any) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"model: expected a mapping, found {quote(value)}")
    try:
        return ModelConfig.from_dict(value)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None


class Recipe(Section):
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: Annotated[ModelConfig, BeforeValidator(_parse_model_config), PlainSerializer(ModelConfig.to_dict)] = (
        ModelConfig()
    )
    train: TrainSection = TrainSection()
    sweep: SweepSection = SweepSection()
    evaluate: EvaluateSection = EvaluateSection()
    ablate: AblateSection = AblateSection()
    compare: CompareSection = CompareSection()
    report: ReportSection = ReportSection()
    promote: PromoteSection = PromoteSection()
    serve: ServeSection = ServeSection()
    demo: DemoSection = DemoSection()
    tracking: TrackingSection = TrackingSection()

    # ModelConfig is a plain dataclass (model/ depends on torch alone), which pydantic must not revalidate.
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
    def prepared_data(self) -> Path | None:
        """The data folder, or None if there is none yet."""
        return self.data_folder if self.data_folder.is_dir() else None

    @property
    def sweep_folder(self) -> Path:
        return self.run.folder / "sweeps" / self.sweep.name

    @property
    def experiments_folder(self) -> Path:
        return self.run.folder / "experiments"

    @property
    def final_checkpoint(self) -> Path:
        return self.run_folder / "final"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON and for :func:`pipelines.recipe.loading.recipe_from_dict`."""
        return self.model_dump(mode="json")

    def to_public_dict(self) -> dict[str, Any]:
        """Return the values of :meth:`to_dict` without the password of ``tracking.uri``."""
        values = self.to_dict()
        if self.tracking.uri is not None:
            values["tracking"]["uri"] = without_password(self.tracking.uri)
        return values
