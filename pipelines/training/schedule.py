"""Schedules of the learning rate and of the multi-token prediction loss."""

from __future__ import annotations

import math

from pipelines.recipe.schema import TrainSection


def decay_progress(train: TrainSection, step: int, total_steps: int) -> float:
    """Return the completed share of the learning rate decay after ``step`` updates; not above 0 before it begins."""
    decay_steps = max(1, round(total_steps * train.decay_share))
    return (step - (total_steps - decay_steps)) / decay_steps


def learning_rate_scale(train: TrainSection, step: int, total_steps: int) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, constant, cosine to ``final_lr_share``."""
    progress = decay_progress(train, step, total_steps)
    scale = min(1.0, (step + 1) / max(1, train.warmup_steps))
    if progress > 0:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        scale *= train.final_lr_share + (1 - train.final_lr_share) * cosine
    return scale


def mtp_loss_weight(train: TrainSection, step: int, total_steps: int) -> float:
    """Return the weight of the multi-token prediction loss, which is lower during learning rate decay."""
    return train.mtp_decay_loss_weight if decay_progress(train, step, total_steps) > 0 else train.mtp_loss_weight
