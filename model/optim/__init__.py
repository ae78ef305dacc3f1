"""The optimizer: Muon for matrices and AdamW for all other parameters."""

from model.optim.config import OptimizerConfig
from model.optim.muon_adamw import ADAMW_NAMES, MuonAdamW, rule_for

__all__ = ["ADAMW_NAMES", "MuonAdamW", "OptimizerConfig", "rule_for"]
