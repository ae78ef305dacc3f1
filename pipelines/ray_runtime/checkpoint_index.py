"""Ray Train's list of a run's checkpoints, from which the run goes on.

Ray writes it in place: a process killed meanwhile, or a full disk, would leave a part of it, and a run that cannot go
on. So a whole list is copied aside before each checkpoint. A checkpoint that only the lost one named is trained again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from model.files import write_text

LIST = "checkpoint_manager_snapshot.json"
_PATIENCE = 10.0
"""Seconds."""
_COPY = f"{LIST}.before"


def keep_copy(folder: Path, last: str | None) -> None:
    """Copy the list in ``folder`` aside, if there is a whole one, once it has ``last``, the checkpoint reported before.

    Ray writes it some time after a report; a copy that is two checkpoints behind may name deleted ones only. Where it
    does not come within some seconds, the copy is of what there is. Raises OSError.
    """
    deadline = time.monotonic() + _PATIENCE
    state = _read(folder / LIST)
    while last is not None and last not in json.dumps(state) and time.monotonic() < deadline:
        time.sleep(0.05)
        state = _read(folder / LIST)
    if state is not None:
        write_text(folder / _COPY, json.dumps(state))


def restore(folder: Path) -> int | None:
    """Put the list, or its copy where it is not whole, in order: as far as its checkpoints are still there. Returns how
    many they are (of none, the run begins anew), or None where nothing was wrong."""
    path = folder / LIST
    if not path.exists():
        return None
    whole = _read(path)
    state = whole or _read(folder / _COPY) or {"checkpoint_results": [], "checkpoint_report_indices": []}
    known = list(zip(state["checkpoint_results"], state["checkpoint_report_indices"]))
    left = [(result, index) for result, index in known if (folder / result["checkpoint_dir_name"]).exists()]
    if whole is not None and len(left) == len(known):
        return None
    if left:
        results, indices = map(list, zip(*left))
        state |= {"checkpoint_results": results, "checkpoint_report_indices": indices}
        write_text(path, json.dumps(state | {"latest_checkpoint_result": results[-1]}))
    else:
        path.unlink()
    return len(left)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
