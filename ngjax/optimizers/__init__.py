"""Learned optimizers as `optax` transformations: update rules, and the features they read."""

from ngjax.optimizers.rules import FFRule, LSTMRule
from ngjax.optimizers.transform import LearnedOptState, init_meta_params, ng_learned_opt

__all__ = ["FFRule", "LSTMRule", "LearnedOptState", "init_meta_params", "ng_learned_opt"]
