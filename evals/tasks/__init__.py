"""lm-eval tasks. Importing this package makes ``fiftyfold`` a model of lm-eval (:class:`evals.lm.CheckpointLM`)."""

from lm_eval.api.registry import model_registry

MODEL_NAME = "fiftyfold"

if MODEL_NAME not in model_registry:
    model_registry.register(MODEL_NAME, target="evals.lm:CheckpointLM")
