"""Costs of a network: cache bytes, FLOPs per decoded token and parameters, in closed form or counted from tensors."""

from model.costs.ablations import Ablation, SideEffect, find_ablations
from model.costs.cache import cache_bytes, cache_bytes_per_token, fixed_state_bytes
from model.costs.crossovers import Crossover, find_crossovers
from model.costs.families import COMPARED, SSA_DENSITY, family_config, family_costs, ssa_costs, with_ssa
from model.costs.flops import decode_work, feed_forward_work
from model.costs.parameters import PARAMETER_RULE, ParameterCount, count_parameters, expert_weight_bytes
from model.costs.references import CostModel, costs_of, gqa8_costs, times, v32_costs, with_gqa8
from model.costs.waterfall import Step, waterfall
from model.work import FP8_EQUIVALENT, WEIGHTING, Work

__all__ = [
    "COMPARED",
    "FP8_EQUIVALENT",
    "PARAMETER_RULE",
    "SSA_DENSITY",
    "WEIGHTING",
    "Ablation",
    "CostModel",
    "Crossover",
    "ParameterCount",
    "SideEffect",
    "Step",
    "Work",
    "cache_bytes",
    "cache_bytes_per_token",
    "costs_of",
    "count_parameters",
    "decode_work",
    "expert_weight_bytes",
    "family_config",
    "family_costs",
    "feed_forward_work",
    "find_ablations",
    "find_crossovers",
    "fixed_state_bytes",
    "gqa8_costs",
    "ssa_costs",
    "times",
    "v32_costs",
    "waterfall",
    "with_gqa8",
    "with_ssa",
]
