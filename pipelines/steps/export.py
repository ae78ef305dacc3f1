"""Convert a checkpoint: from a folder of ours, of transformers or of the release, to another of them or to GGUF."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from model import checkpoint
from model.config import CACHE_FORMATS
from model.errors import ConfigError
from model.gguf_format import WeightType, export_gguf
from model.hf import export_pretrained, import_pretrained, is_pretrained
from model.tokenizer import FILE_NAME as TOKENIZER_FILE
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from pipelines.recipe.schema import Recipe, load_recipe

GGUF = "gguf"
FORMATS = ("fiftyfold", "transformers", "released", GGUF)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER",
        type=Path,
        help="a checkpoint of ours, of DeepseekV4ForCausalLM or as released; without it, the run's final one",
    )
    parser.add_argument(
        "--to", metavar="PATH", type=Path, help="the folder to write (a file for gguf), which must not exist"
    )
    parser.add_argument("--format", help=f"{', '.join(FORMATS)}; default transformers", default="transformers")
    parser.add_argument(
        "--experts",
        choices=("fp4", "fp8"),
        help="number format of the routed experts in the released format; default FP4 for models trained with qat",
    )
    parser.add_argument("--type", choices=get_args(WeightType), help="of the large matrices in GGUF; default f32")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="'byte' or a tokenizer.json, for a checkpoint that comes without one"
    )


def load(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The recipe, whose run is exported when ``--from`` names nothing else. Raises ConfigError."""
    for item in overrides:
        if item.startswith(("model.", "train.", "data.")):
            key = item.partition("=")[0]
            raise ConfigError(f"command line: --{key} would change nothing: an export keeps the network as it is")
    return load_recipe(files, overrides)


def run(recipe: Recipe, options: argparse.Namespace) -> Path:
    """Write ``--to`` and return it. Raises ConfigError or CheckpointError; nothing is left half-written."""
    source: Path = options.source or recipe.final_checkpoint
    target: Path | None = options.to
    if target is None:
        raise ConfigError("--to: names nothing to write")
    if options.format not in FORMATS:
        raise ConfigError(f"--format: '{options.format}' is not one of {', '.join(FORMATS)}")
    if target.exists():
        raise ConfigError(f"--to: {target} exists already")
    for name in ("experts", "tokenizer") if options.format == GGUF else ("type",):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: changes nothing in format '{options.format}'")
    model = import_pretrained(source) if is_pretrained(source) else checkpoint.load(source)
    if options.format == GGUF:
        return _export_gguf(model, target, options.type or "f32")
    tokenizer = _tokenizer(source, options.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer: knows {tokenizer.vocab_size} tokens, the model of {source} has {model.config.vocab_size}"
        )
    if options.format == "fiftyfold":
        checkpoint.save(model, target, tokenizer)
    else:
        export_pretrained(model, target, options.format, tokenizer, options.experts)
    print(f"wrote {target} ({options.format}, {model.num_parameters():,} parameters)")
    if options.format == "transformers":
        _tell_of_rounding("transformers", model)
    if tokenizer is None:
        print("without a tokenizer: the source has none, and --tokenizer names none")
    return target


def _export_gguf(model: Transformer, target: Path, weights: WeightType) -> Path:
    export_gguf(model, target, weights)
    print(f"wrote {target} (gguf {weights}, {model.num_parameters():,} parameters)")
    _tell_of_rounding("llama.cpp", model)
    print("without a vocabulary: llama.cpp takes and gives token ids")
    if model.config.mtp_layers:
        print("without the multi-token prediction module, which decoding does not use")
    return target


def _tell_of_rounding(reader: str, model: Transformer) -> None:
    """Say that ``reader`` rounds no cache entries where this network does."""
    rounded = {name: fmt for name in CACHE_FORMATS if (fmt := getattr(model.config, name)) != "fp32"}
    if rounded:
        here = ", ".join(f"{name} {fmt}" for name, fmt in rounded.items())
        print(f"{reader} keeps its cache in floats: logits differ a little from those here ({here})")


def _tokenizer(source: Path, named: str | None) -> Tokenizer | None:
    if named is not None:
        return load_tokenizer(named)
    return load_tokenizer(source) if (source / TOKENIZER_FILE).is_file() else None
