"""Learned optimizers as `optax` transformations: update rules, and the features they read."""

from ngjax.optimizers.graph_rules import GraphRule
from ngjax.optimizers.meta_file import load_meta_params, save_meta_params
from ngjax.optimizers.meta_params import init_meta_params
from ngjax.optimizers.named_rules import PAPER_RULES, RULES
from ngjax.optimizers.rules import CoordinatewiseLSTMRule, FFRule, LSTMRule
from ngjax.optimizers.transform import LearnedOptState, ng_learned_opt

__all__ = [
    "PAPER_RULES",
    "RULES",
    "CoordinatewiseLSTMRule",
    "FFRule",
    "GraphRule",
    "LSTMRule",
    "LearnedOptState",
    "init_meta_params",
    "load_meta_params",
    "ng_learned_opt",
    "save_meta_params",
]
