"""Source files: from patterns to a list of readable files."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""Folders outside the library itself. Only some distributions ship its tests."""


@dataclass(frozen=True)
class SourceFile:
    name: str
    """The path as text, with bytes that are not UTF-8 escaped."""
    path: Path
    bytes: int


def find_files(patterns: tuple[str, ...], seed: int) -> list[SourceFile]:
    """Return all source files, each once, ordered by a hash of their name and ``seed``. A file with several names, by
    links or ``..``, has the first one given.

    In alphabetical order, the first shards and anything cut off by ``max_text_bytes`` would cover one part of the
    corpus only. Raises DataError for a pattern without files, an unsupported suffix, or anything but a readable file.
    """
    if not patterns:
        files = [_open(name, path) for name, path in _find_stdlib().items()]
    else:
        found = [Path(name) for pattern in patterns for name in _expand(pattern)]
        by_place = {os.path.realpath(path): path for path in reversed(found)}  # the first name of a file named twice
        files = [_open(str(path), path) for path in by_place.values()]
    return sorted(files, key=lambda file: hashlib.sha256(f"{seed}\0{file.name}".encode()).digest())


def _open(name: str, path: Path) -> SourceFile:
    """Check that ``path`` is a file of a known kind that can be opened, before anything is read."""
    name = _printable(name)
    if path.suffix.lower() not in SUFFIXES:
        suffix = _printable(path.suffix)
        raise DataError(f"data.sources: {name}: unsupported suffix '{suffix}'; sources are {', '.join(SUFFIXES)} files")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise DataError(f"data.sources: {name}: is not a regular file")
        with path.open("rb"):
            return SourceFile(name, path, status.st_size)
    except OSError as error:
        raise DataError(f"data.sources: {name}: cannot be read ({error.strerror})") from error


def _printable(name: str) -> str:
    """Return a file name as valid Unicode, with bytes that are not UTF-8 written as ``\\xe9``."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _find_stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    found = {
        f"stdlib/{path.as_posix()}": root / path for path in relative_paths if STDLIB_SKIPPED.isdisjoint(path.parts)
    }
    if not found:
        raise DataError(f"data.sources: is empty, and {root} has no source files of the standard library")
    return found


# --- patterns


def _expand(pattern: str) -> list[str]:
    """Return the files that a path or glob names, in order. Raises DataError if there are none."""
    found = sorted(set(_glob(_keep_brackets(pattern))))
    files = [name for name in found if not os.path.isdir(name)]
    if not files:
        hint = f"; for the files of a folder write {pattern.rstrip('/')}/**/*.txt or the like" if found else ""
        raise DataError(f"data.sources: '{pattern}' matches no file{hint}")
    return files


def _keep_brackets(pattern: str) -> str:
    """Escape the brackets in the longest part of a pattern that exists as written, as in ``notes[v2].txt``."""
    existing = pattern
    while existing and not os.path.lexists(existing):
        existing = existing.rstrip("/").rpartition("/")[0]
    return existing.replace("[", "[[]") + pattern[len(existing) :]


def _glob(pattern: str) -> Iterator[str]:
    """Expand a glob. Unlike in :mod:`glob`, ``**`` enters every folder once, even if links form cycles."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    index = parts.index("**")
    head, tail = "/".join(parts[:index]), "/".join(parts[index + 1 :]) or "*"
    bases = glob.iglob(head + "/") if index else [""]
    for base in bases:
        for folder in _folders(base or "."):
            inside = folder if base else folder.removeprefix(".").removeprefix("/")
            yield from _glob(os.path.join(glob.escape(inside), tail))


def _folders(base: str) -> Iterator[str]:
    """Yield ``base`` and all folders in it but hidden ones, each once, in order."""
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise DataError(f"data.sources: {_printable(str(error.filename))}: cannot be read ({error.strerror})")

    for folder, inner, _ in os.walk(base, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield folder
