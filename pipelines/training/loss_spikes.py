"""Detection of updates to skip: a non-finite gradient or a loss spike."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from model.errors import CheckpointError, FiftyfoldError
from pipelines.recipe.schema import StabilitySection


class SpikeDetector:
    """Checks each update against the recent losses.

    Decisions depend on losses and gradient norms alone, so that all ranks, and a resumed run, agree.
    """

    def __init__(self, settings: StabilitySection):
        self.settings = settings
        self.interventions = 0
        """Updates rejected since the run began."""
        self._losses: deque[float] = deque(maxlen=settings.window)

    def reason_to_skip(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return why update ``step`` must be skipped, or None. ``loss`` is in nats per token.

        Raises FiftyfoldError if the recipe ends the run instead.
        """
        reason = self._find_reason(loss, grad_norm)
        if reason is None:
            self._losses.append(loss)
            return None
        if self.settings.action == "stop" or self.interventions == self.settings.max_interventions:
            limit = self.settings.max_interventions
            setting = "action is stop" if self.settings.action == "stop" else f"max_interventions is {limit}"
            raise FiftyfoldError(
                f"step {step}: {reason}, and train.stability.{setting}; resume from the last checkpoint"
            )
        self.interventions += 1
        return reason

    def _find_reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(grad_norm) or not math.isfinite(loss):
            return f"the gradient is not finite (loss {loss:g})"
        spike = self.settings.spike
        if spike is None or len(self._losses) < self.settings.window // 2:
            return None
        median = statistics.median(self._losses)
        return f"the loss spiked from {median:.3f} to {loss:.3f}" if loss > median + spike else None

    def reset(self) -> None:
        """Clear the loss history, at a stage boundary."""
        self._losses.clear()

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"interventions": self.interventions, "losses": list(self._losses)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`. Raises CheckpointError for anything else."""
        try:
            self.interventions = int(state["interventions"])
            self._losses = deque(map(float, state["losses"]), self.settings.window)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"stability: not a valid state ({error!r})") from error
