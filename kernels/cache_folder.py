"""Folder of compiled code and measured settings."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache folder (``XDG_CACHE_HOME``). It may not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fiftyfold" / name
