"""Convert a checkpoint between our format, transformers and the released format, or to GGUF."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from model import checkpoint
from model.config import CACHE_FORMATS
from model.errors import ConfigError
from model.gguf import WeightType, export_gguf
from model.hf import export_pretrained, import_pretrained, is_pretrained
from model.hf.family import ExpertFormat
from model.hf.registry import FAMILIES
from model.hf.tensors import WeightFormat
from model.tokenizer import BYTE, load_tokenizer
from model.tokenizer import FILE_NAME as TOKENIZER_FILE
from model.tokenizer.side_files import CONFIG
from model.transformer import Transformer
from pipelines.recipe.loading import load_recipe
from pipelines.recipe.messages import naming
from pipelines.recipe.paths import check_creatable, path_option
from pipelines.recipe.schema import Recipe
from pipelines.steps import Step

GGUF = "gguf"
FORMATS = ("fiftyfold", "transformers", "released", GGUF)
_OPTIONS = {
    "format": "--format",
    "experts": "--experts",
    "weights": "--type",
    "bos_token": "--bos-token",
    "eos_token": "--eos-token",
}
"""Options by the names that :mod:`model` has for them."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the step."""
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        type=path_option("--from"),
        help="a checkpoint folder of this project, of transformers or as DeepSeek-V4 is released "
        f"(model_type {', '.join(FAMILIES)}); default: the run's final checkpoint",
    )
    parser.add_argument(
        "--to",
        dest="target",
        metavar="PATH",
        type=path_option("--to"),
        help="folder to write (file for gguf); must not exist",
    )
    parser.add_argument(
        "--format", dest="target_format", help=f"{', '.join(FORMATS)}; default transformers", default="transformers"
    )
    parser.add_argument(
        "--experts",
        choices=("fp4", "fp8"),
        help="format of the routed experts in the released format; default fp4 for models trained with qat",
    )
    parser.add_argument(
        "--type", dest="weight_type", choices=get_args(WeightType), help="of the large matrices in GGUF; default f32"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=lambda text: text if text == BYTE else str(path_option("--tokenizer")(text).absolute()),
        help="'byte' or a tokenizer.json, for a checkpoint without one",
    )
    for role in ("bos", "eos"):
        parser.add_argument(f"--{role}-token", metavar="TOKEN", help="token in place of the one declared in the source")


def load(options: argparse.Namespace, files: Sequence[Path], overrides: Sequence[str]) -> Recipe:
    """Return the recipe, whose run is exported unless ``--from`` is given. Raises ConfigError."""
    for item in overrides:
        if item.startswith(("model.", "train.", "data.")):
            key = item.partition("=")[0]
            raise ConfigError(f"command line: --{key} would change nothing: an export does not alter the network")
    return load_recipe(files, overrides)


def run(
    recipe: Recipe,
    source: Path | None = None,
    target: Path | None = None,
    target_format: Any = "transformers",
    experts: ExpertFormat | None = None,
    weight_type: WeightType | None = None,
    tokenizer: str | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> Path:
    """Write ``target`` and return it. Raises ConfigError or CheckpointError; no partial output is left behind."""
    source, source_key = (recipe.final_checkpoint, "run.name") if source is None else (source, "--from")
    if target is None:
        raise ConfigError("--to: is missing; it names the folder to write, or the file for --format gguf")
    if target_format not in FORMATS:
        raise ConfigError(f"--format: '{target_format}' is not one of {', '.join(FORMATS)}")
    if os.path.lexists(target):
        raise ConfigError(f"--to: {target} already exists")
    check_creatable(target, "--to")
    tokens: dict[str, str | None] = {"bos-token": bos_token, "eos-token": eos_token}
    unused: dict[str, str | None] = {"type": weight_type}
    if target_format == GGUF:
        unused = {"tokenizer": tokenizer, **tokens}
    if target_format != "released":
        unused["experts"] = experts
    for name, value in unused.items():
        if value is not None:
            raise ConfigError(f"--{name}: changes nothing in format '{target_format}'")
    with naming(source_key):
        model = import_pretrained(source) if is_pretrained(source) else checkpoint.load(source)
    if target_format == GGUF:
        with naming(source_key, _OPTIONS.get):
            _export_gguf(model, target, weight_type or "f32")
        _print_left_behind(source, target)
        return target
    loaded = None
    # A link to nowhere counts as a tokenizer, so that loading it names the fault.
    if tokenizer is not None or os.path.lexists(source / TOKENIZER_FILE):
        with naming(source_key if tokenizer is None else "--tokenizer", _OPTIONS.get):
            loaded = load_tokenizer(tokenizer or source, bos_token, eos_token, model.config.vocab_size)
    for name, value in tokens.items():
        if value is not None and loaded is None:
            raise ConfigError(f"--{name}: {source} has no {TOKENIZER_FILE}; name one with --tokenizer")
    changes: dict[WeightFormat, float] = {}
    if target_format == "fiftyfold":
        checkpoint.save(model, target, loaded)
    else:
        with naming(source_key, _OPTIONS.get):
            changes = export_pretrained(model, target, target_format, loaded, experts)
    print(f"wrote {target} ({target_format}, {model.num_parameters():,} parameters)")
    if changes:
        formats = ", ".join(f"{fmt.upper()} (by at most {change:.2g})" for fmt, change in changes.items())
        print(f"weights are rounded to {formats}; importing {target} does not restore the exact ones")
    if target_format == "transformers":
        _print_precision_note("transformers", model)
    if loaded is None:
        print(f"without a tokenizer: the source has no {TOKENIZER_FILE}, and --tokenizer is not given")
    _print_left_behind(source, target)
    return target


def _print_left_behind(source: Path, target: Path) -> None:
    """Print the files of a checkpoint in a foreign format that have no counterpart in ``target``."""
    if not is_pretrained(source):
        return
    names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    left = [
        str(name)
        for name in names
        if not any(part.startswith(".") for part in name.parts)
        and not name.name.endswith((".safetensors", ".safetensors.index.json"))
        and str(name) != CONFIG
        and not (target / name).exists()
    ]
    if left:
        print(f"left behind: {', '.join(left)}")


def _export_gguf(model: Transformer, target: Path, weights: WeightType) -> None:
    export_gguf(model, target, weights)
    print(f"wrote {target} (gguf {weights}, {model.num_parameters():,} parameters)")
    if model.config.qat:
        print("weights of routed experts are rounded to FP4, as in the forward pass here")
    _print_precision_note("llama.cpp", model)
    print("without a vocabulary: llama.cpp reads and writes token ids")
    if model.config.mtp_layers:
        print("without the multi-token prediction module, which decoding does not use")


def _print_precision_note(reader: str, model: Transformer) -> None:
    """Print that ``reader`` does not quantize cache entries, if this network does."""
    used = {name for mixer in model.config.mixers for name in mixer.formats}
    quantized = {name: fmt for name in CACHE_FORMATS if name in used and (fmt := getattr(model.config, name)) != "fp32"}
    if quantized:
        here = ", ".join(f"{name} {fmt}" for name, fmt in quantized.items())
        print(f"{reader} keeps its cache in floats: its logits differ slightly from those here ({here})")


STEP = Step(run, add_options, load)
