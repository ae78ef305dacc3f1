"""Names of metrics that recipes, trainings and reports share."""

LOSS, RECALL = "validation/loss", "validation/recall"
STEP_SECONDS = "train/step_seconds"
