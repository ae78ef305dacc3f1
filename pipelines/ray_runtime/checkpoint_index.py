"""Ray Train's index of a run's checkpoints, from which the run resumes.

Ray writes the index in place, so a killed process or a full disk leaves a truncated one and a run that cannot resume.
The index is therefore backed up before each checkpoint. The step of a checkpoint missing from the backup is trained
again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from model.atomic_files import write_text

INDEX = "checkpoint_manager_snapshot.json"
_TIMEOUT_SECONDS = 10.0
_BACKUP = f"{INDEX}.before"


def back_up(folder: Path, last: str | None) -> None:
    """Back up the index in ``folder``, if it is complete, once it lists ``last``, the checkpoint reported before.

    Ray writes the index some time after a report, and a backup two checkpoints behind may list deleted ones only. If
    ``last`` does not appear within a timeout, the index is backed up as it is. Raises OSError.
    """
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    index = _read(folder / INDEX)
    while last is not None and last not in json.dumps(index) and time.monotonic() < deadline:
        time.sleep(0.05)
        index = _read(folder / INDEX)
    if index is not None:
        write_text(folder / _BACKUP, json.dumps(index))


def repair(folder: Path) -> int | None:
    """Repair the index: fall back to the backup if it is truncated, and drop entries whose folder is gone.

    Return the number of checkpoints kept, or None if nothing needed repair. Without any, the index is deleted and the
    run starts over.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    intact = _read(path)
    index = intact or _read(folder / _BACKUP) or {"checkpoint_results": [], "checkpoint_report_indices": []}
    listed = list(zip(index["checkpoint_results"], index["checkpoint_report_indices"]))
    kept = [(result, number) for result, number in listed if (folder / result["checkpoint_dir_name"]).exists()]
    if intact is not None and len(kept) == len(listed):
        return None
    if kept:
        results, numbers = map(list, zip(*kept))
        index |= {"checkpoint_results": results, "checkpoint_report_indices": numbers}
        write_text(path, json.dumps(index | {"latest_checkpoint_result": results[-1]}))
    else:
        path.unlink()
    return len(kept)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
