"""Tokenizer and limits that documents are generated for, as named by a task's metadata.

lm-eval merges the arguments of the model into the metadata, so that ``--model_args pretrained=folder`` or
``checkpoint=folder`` is enough. A vacuous setting raises ConfigError: the model could answer without long-range memory,
because stacked sliding windows reach the fact or a layer with an indexer selects all of its compressed entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.documents.base import MAX_ANSWER
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf import is_pretrained, read_pretrained_config
from model.tokenizer import Tokenizer, load_tokenizer
from model.wording import count, quote

API_CONTEXT = 2048
"""Context in tokens that lm-eval assumes of a server, where ``max_length`` names none; it truncates longer prompts."""


@dataclass(frozen=True)
class Source:
    """Tokenizer, configuration and length limit of the model that documents are generated for."""

    tokenizer: Tokenizer
    config: ModelConfig | None
    """None if the architecture is not known."""
    max_tokens: int | None
    """Length in tokens of the longest document, with BOS and its answer. None: not known."""

    @property
    def stacked_windows(self) -> int:
        """Upper bound on the tokens that stacked sliding windows can carry a fact."""
        return 0 if self.config is None else len(self.config.layers) * self.config.window

    def check_length(self, length: int) -> None:
        """Raise ConfigError, naming the longest length, if the model cannot hold documents of ``length`` tokens."""
        if self.max_tokens is not None and length > self.max_tokens:
            raise ConfigError(
                f"{length} exceeds the model's context; choose lengths up to {self.max_tokens} tokens", "length"
            )

    def distance(self, task: str, distance: int | None) -> int:
        """Return the tokens between facts and questions, by default the stacked windows.

        Raises ConfigError if ``distance`` is vacuous, or missing where the architecture is not known.
        """
        if distance is None:
            if self.config is None:
                raise ConfigError(
                    f"{task}: the metadata must give the distance in tokens between facts and questions, because the "
                    "model's windows are not known; 0 for a model without sliding windows"
                )
            return self.stacked_windows
        if isinstance(distance, bool) or not isinstance(distance, int) or distance < 0:
            raise ConfigError(f"expected a whole number of tokens, found {quote(distance)}", "distance")
        if self.config is not None and distance < self.stacked_windows:
            windows = count(len(self.config.layers), "stacked window")
            raise ConfigError(
                f"{distance} proves nothing, because {windows} of {self.config.window} tokens reach a fact up to "
                f"{self.stacked_windows} tokens before its question",
                "distance",
            )
        return distance

    def check_selection(self, task: str, length: int, tokens: int) -> None:
        """Raise ConfigError if indexers would select all entries of ``tokens`` tokens."""
        if self.config is None or not self.config.indexed_layers:
            return
        entries = min(tokens // ratio for ratio in self.config.indexer_ratios.values())
        if entries <= self.config.index_topk:
            raise ConfigError(
                f"{length} proves nothing for {task}, because there are {entries} compressed entries before the first "
                f"question, and indexers select {self.config.index_topk} of them (index_topk)",
                "length",
            )


def load_source(task: str, metadata: Mapping[str, Any]) -> Source:
    """Return the source that ``checkpoint``, ``pretrained`` or ``tokenizer`` names, the first of them that is given.

    Raises ConfigError if there is none, and CheckpointError for a folder that cannot be read.
    """
    folder = next((metadata[name] for name in ("checkpoint", "pretrained", "tokenizer") if metadata.get(name)), None)
    if folder is None:
        raise ConfigError(
            f'{task}: the metadata must name a checkpoint folder, as in {{"checkpoint": "runs/a/final"}}, a folder of '
            'transformers ("pretrained") or a "tokenizer"'
        )
    config = None if folder == "byte" else _read_config(Path(folder))
    tokenizer = load_tokenizer(folder, model_vocab_size=None if config is None else config.vocab_size)
    limits = [] if config is None else [config.max_positions]
    if not metadata.get("checkpoint"):
        # Other models of lm-eval truncate a prompt that leaves no room for the longest answer.
        limits = [limit - MAX_ANSWER for limit in limits]
        default = API_CONTEXT if "base_url" in metadata else _positions(Path(folder))
        if (most := metadata.get("max_length") or default) is not None:
            limits.append(int(most) - MAX_ANSWER - 1)
    return Source(tokenizer, config, min(limits, default=None))


def _read_config(folder: Path) -> ModelConfig | None:
    if not (folder / "config.json").is_file():
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            return checkpoints.load_config(folder)  # its error says what is missing
        return None
    if not is_pretrained(folder):
        return checkpoints.load_config(folder)
    try:
        return read_pretrained_config(folder)
    except CheckpointError:
        return None  # a model of another family


def _positions(folder: Path) -> int | None:
    """Return the context of a transformers checkpoint, if its ``config.json`` states it."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content.get("max_position_embeddings")
