"""Atomic writing of files and folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def made_parents(target: Path) -> Iterator[None]:
    """Create the missing parents of ``target``. After the block, remove those that are empty."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # it does not exist, or holds the target or what others have put there
                folder.rmdir()


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder that replaces ``target`` if the block ends without an exception. Otherwise, parents
    made for it are removed.

    Replacing takes two renames. A process killed between them leaves the old content in ``.<name>-...-old``.
    """
    target = Path(target)
    with made_parents(target):
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:  # it names the scratch folder
            raise OSError(error.errno, error.strerror, str(target)) from error
        try:
            yield scratch
            scratch.chmod(0o755)
            for file in scratch.rglob("*"):  # some writers create files that only the owner can read
                file.chmod(0o755 if file.is_dir() else 0o644)
            _replace(target, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _replace(target: Path, scratch: Path) -> None:
    """Rename the folder ``scratch`` to ``target``. A folder that is there is restored if that fails, else removed."""
    if not target.exists():
        os.replace(scratch, target)
        return
    old = scratch.with_name(scratch.name + "-old")
    os.replace(target, old)
    try:
        os.replace(scratch, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a sibling path. The file written there replaces ``target`` if the block ends without an exception."""
    target = Path(target)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.chmod(0o644)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as scratch:
        scratch.write_text(content)
