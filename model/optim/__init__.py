"""The optimizer: Muon for matrices, AdamW for the rest."""

from model.optim.config import OptimizerConfig
from model.optim.muon_adamw import ADAMW_NAMES, MuonAdamW, rule_for

__all__ = ["ADAMW_NAMES", "MuonAdamW", "OptimizerConfig", "rule_for"]
