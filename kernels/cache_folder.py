"""Location of the on-disk cache of compiled libraries and tuned tile settings."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the path of ``fiftyfold/<name>`` in the user's cache folder (``XDG_CACHE_HOME``). Does not create it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fiftyfold" / name
