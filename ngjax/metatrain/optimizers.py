"""The optimizers that meta-training makes from meta-parameters."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ngjax.metatrain.tasks import Task
from ngjax.metatrain.unroll import Schedule
from ngjax.optimizers import ng_learned_opt


@dataclasses.dataclass(frozen=True)
class LearnedOptimizer:
    """Makes `ng_learned_opt` from meta-parameters under training.

    Attributes:
      rule: as for `ng_learned_opt`.
      step: form of its step. With `"paper"` the learning rate is learned, and that of the run plays no part.
    """

    rule: str | nn.Module = "ff"
    step: Literal["normalized", "paper"] = "normalized"

    def __call__(self, theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
        if "step" in inspect.signature(ng_learned_opt).parameters:
            make: Any = ng_learned_opt
            rate = learning_rate if self.step == "normalized" else 1.0
            return make(self.rule, spec=task.spec(), meta_params=theta, step=self.step, learning_rate=rate)
        # Until ng_learned_opt has steps of its own.
        rule: Any = self.rule
        raw = ng_learned_opt(rule, spec=task.spec(), meta_params=theta)
        if self.step == "paper":
            return raw
        return optax.chain(raw, _unit_rms(), optax.scale_by_schedule(learning_rate))


def _unit_rms() -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u * jax.lax.rsqrt(jnp.mean(u * u) + 1e-20), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adam(theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
    """Adam in the place of a learned optimizer, to compare with."""
    del theta, task
    return optax.adam(learning_rate)
