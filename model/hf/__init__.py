"""Checkpoints in the formats of Hugging Face transformers and of the models' releases.

:func:`import_pretrained` reads folders of other tools, :func:`export_pretrained` writes them. Nothing in a folder is
executed or unpickled.
"""

from __future__ import annotations

from model.hf.exporting import export_pretrained
from model.hf.importing import import_pretrained, is_pretrained, read_pretrained_config

__all__ = ["export_pretrained", "import_pretrained", "is_pretrained", "read_pretrained_config"]
