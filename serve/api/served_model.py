"""The model behind the routes."""

from __future__ import annotations

from dataclasses import dataclass

from serve.api.chat_template import ChatTemplate
from serve.api.errors import ModelNotFoundError
from serve.api.logprobs import TokenFormatter
from serve.engine import Engine


@dataclass(frozen=True)
class ServedModel:
    """An engine and the name that clients use for its model."""

    name: str
    engine: Engine
    token_formatter: TokenFormatter
    chat_template: ChatTemplate
    version: str | None = None
    """Version of the model registry."""

    def check_name(self, requested: str | None) -> None:
        """Raise ModelNotFoundError unless ``requested`` is this model's name or None."""
        if requested not in (None, self.name):
            raise ModelNotFoundError(str(requested), [self.name])
