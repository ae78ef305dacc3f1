"""Anticipatory routing (report 4.2.3): experts are chosen by weights some updates older than those that then run.

A spike feeds itself where an update moves the router and the experts that it chooses at once. So after one, and for a
bounded number of updates, a batch is read ``lag`` updates before its turn and routed with the weights of that moment;
when its turn comes, they say which experts run, and the weights of that later moment all else: how much each of the
chosen counts, what they compute, the balance loss. No older weights are kept, only choices.

Published is this much, and that it begins with a short roll-back. Ours to decide:

* It begins with every roll-back of :mod:`pipelines.training.loss_spikes`, also where no loss leapt but a gradient was not finite.
* There are no weights older than those rolled back to. These route the first ``lag + 1`` batches, so that the age of
  the choices grows from 0 to ``lag``. A roll-back meanwhile begins anew.
* It ends after ``steps`` updates, or with the stage: the next one's batches and attention are others.
* The selection bias that evens out the experts' load is the router's, and as old. It goes on moving with the load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from pipelines.data.packing import Batch, TrainBatches
from pipelines.recipe.schema import AnticipatorySection
from pipelines.training.collectives import gather_over_ranks, rank, world_size

Choices = dict[int, Tensor]
"""int64 [B, S, K] by layer: this rank's experts for a batch."""
TENSORS = "anticipated/"


class AnticipatoryRouting:
    """The choices made ahead for the coming batches, while any are."""

    def __init__(self, settings: AnticipatorySection | None):
        self.settings = settings
        self.left = 0
        """Updates still to come with older choices."""
        self._made: deque[tuple[int, Choices]] = deque()
        """For the next batches in turn: the updates that the weights had seen, and what they chose."""

    def begin(self) -> None:
        """The run was rolled back."""
        self._made.clear()
        self.left = self.settings.steps if self.settings is not None else 0

    def end(self) -> None:
        self._made.clear()
        self.left = 0

    def next(
        self, step: int, until: int, batches: TrainBatches, choose: Callable[[Batch], Choices]
    ) -> tuple[int, Choices]:
        """The age in updates and the choices for the next batch. ``choose`` routes a batch with the present weights,
        which have seen ``step`` updates; the stage ends after ``until``."""
        assert self.settings is not None
        wanted = min(self.settings.lag + 1, self.left, until - step)
        for batch in batches.ahead(wanted)[len(self._made) :]:
            self._made.append((step, choose(batch)))
        self.left -= 1
        made, choices = self._made.popleft()
        return step - made, choices

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        return {"left": self.left, "made": [made for made, _ in self._made]}

    def tensors(self) -> dict[str, Tensor]:
        """All ranks' choices, int32 [world, B, S, K], by number and layer. Every rank must take part."""
        return {
            f"{TENSORS}{number}/{layer}": gather_over_ranks(chosen.int())
            for number, (_, choices) in enumerate(self._made)
            for layer, chosen in choices.items()
        }

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """Inverse of :meth:`state` and :meth:`tensors`. Where the world's size is another, so are every rank's batches:
        they are routed anew. Raises CheckpointError."""
        self._made.clear()
        try:
            self.left = int(state["left"])
            choices: list[Choices] = [{} for _ in state["made"]]
            for name, every in tensors.items():
                if name.startswith(TENSORS) and len(every) == world_size():
                    number, layer = map(int, name.removeprefix(TENSORS).split("/"))
                    choices[number][layer] = every[rank()].to(device, torch.int64)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"anticipatory routing: not a state of it ({error!r})") from error
        if all(choices):
            self._made.extend(zip(map(int, state["made"]), choices))
