"""Anticipatory routing (report 4.2.3): experts selected by router weights a few updates older than the other weights.

A loss spike feeds itself when one update moves both the router and the experts it selects. After a rollback, and for a
bounded number of updates, each batch is therefore routed ``lag`` updates before it is trained on. At its turn the
stored expert ids are used; gate weights, expert outputs and the balance loss come from the current weights. Only expert
ids are stored, never older weights.

The report publishes this scheme and that it starts with a short rollback. Our choices beyond it:

* It starts with every rollback (:mod:`pipelines.training.loss_spikes`), also one for a non-finite gradient.
* No weights older than the restored ones exist, so they route the first ``lag + 1`` batches: the age of the expert ids
  grows from 0 to ``lag``. Another rollback starts over.
* It ends after ``steps`` updates, or with the stage, since batches and attention mode change there.
* The load-balancing bias is part of the router and equally old. It keeps adapting to the load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from pipelines.data.batches import Batch, TrainBatches
from pipelines.recipe.schema import AnticipatorySection
from pipelines.training.collectives import gather_over_ranks, rank, world_size

ExpertIds = dict[int, Tensor]
"""This rank's selected experts for a batch, by layer: int64 [B, S, K]."""
TENSORS = "anticipated/"
"""Prefix of the tensor names in a checkpoint."""


class AnticipatoryRouting:
    """Queue of expert ids for the coming batches."""

    def __init__(self, settings: AnticipatorySection | None):
        self.settings = settings
        self.remaining = 0
        """Updates left with older router weights."""
        self._queue: deque[tuple[int, ExpertIds]] = deque()
        """For each coming batch, in order: the step at which it was routed, and its expert ids."""

    def start(self) -> None:
        """Start after a rollback. Does nothing where the recipe does not ask for anticipatory routing."""
        self._queue.clear()
        self.remaining = self.settings.steps if self.settings is not None else 0

    def stop(self) -> None:
        """Stop at the end of a stage."""
        self._queue.clear()
        self.remaining = 0

    def next(
        self, step: int, end: int, batches: TrainBatches, route: Callable[[Batch], ExpertIds]
    ) -> tuple[int, ExpertIds]:
        """Return the age in updates and the expert ids of the next batch.

        Args:
            step: Updates made so far.
            end: Step at which the stage ends.
            batches: Source of the coming batches, which are peeked at.
            route: Selects experts for a batch with the current weights.
        """
        assert self.settings is not None
        wanted = min(self.settings.lag + 1, self.remaining, end - step)
        for batch in batches.peek(wanted)[len(self._queue) :]:
            self._queue.append((step, route(batch)))
        self.remaining -= 1
        routed_at, expert_ids = self._queue.popleft()
        return step - routed_at, expert_ids

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the state without tensors, as plain values."""
        return {"left": self.remaining, "made": [routed_at for routed_at, _ in self._queue]}

    def tensors(self) -> dict[str, Tensor]:
        """Return the expert ids of all ranks, int32 [world, B, S, K], by batch and layer. Every rank must call it."""
        return {
            f"{TENSORS}{i}/{layer}": gather_over_ranks(ids.int())
            for i, (_, expert_ids) in enumerate(self._queue)
            for layer, ids in expert_ids.items()
        }

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """Restore :meth:`state` and :meth:`tensors`. Raises CheckpointError for anything else.

        A different world size gives every rank different batches, which are then routed again.
        """
        self._queue.clear()
        try:
            self.remaining = int(state["left"])
            queue: list[ExpertIds] = [{} for _ in state["made"]]
            for name, gathered in tensors.items():
                if name.startswith(TENSORS) and len(gathered) == world_size():
                    i, layer = map(int, name.removeprefix(TENSORS).split("/"))
                    queue[i][layer] = gathered[rank()].to(device, torch.int64)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"anticipatory routing: not a valid state ({error!r})") from error
        if all(queue):
            self._queue.extend(zip(map(int, state["made"]), queue))
