"""Names of metrics that recipes, trainings and reports share."""

LOSS = "validation/loss"
