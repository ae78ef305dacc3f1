"""When an update is not to be made: a gradient that is not finite, or a loss that leapt up."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from model.errors import CheckpointError, FiftyfoldError
from pipelines.recipe.schema import StabilitySection


class Stability:
    """Watches a run's losses. What it says depends on them alone, so that all ranks, and a resumed run, agree."""

    def __init__(self, settings: StabilitySection):
        self.settings = settings
        self.interventions = 0
        """Updates objected to since the run began."""
        self._losses: deque[float] = deque(maxlen=settings.window)

    def objects(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the update ``step`` with this loss (nats per token) and gradient norm must not be made; None to make it.

        Raises FiftyfoldError where the run is to end instead.
        """
        found = self._trouble(loss, grad_norm)
        if found is None:
            self._losses.append(loss)
            return None
        if self.settings.action == "stop" or self.interventions == self.settings.max_interventions:
            most = self.settings.max_interventions
            why = "action is stop" if self.settings.action == "stop" else f"max_interventions is {most}"
            raise FiftyfoldError(
                f"step {step}: {found}, and train.stability.{why}; the weights of the last checkpoint are good"
            )
        self.interventions += 1
        return found

    def _trouble(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(grad_norm) or not math.isfinite(loss):
            return f"the gradient is not finite (loss {loss:g})"
        spike = self.settings.spike
        if spike is None or len(self._losses) < self.settings.window // 2:
            return None
        usual = statistics.median(self._losses)
        return f"the loss leapt from {usual:.3f} to {loss:.3f}" if loss > usual + spike else None

    def forget(self) -> None:
        """A stage begins, whose losses are others."""
        self._losses.clear()

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        return {"interventions": self.interventions, "losses": list(self._losses)}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`. Raises CheckpointError for anything else."""
        try:
            self.interventions = int(state["interventions"])
            self._losses = deque(map(float, state["losses"]), self.settings.window)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"stability: not a state of it ({error!r})") from error
