"""The optimizers that meta-training makes from meta-parameters."""

from __future__ import annotations

import dataclasses
from typing import Literal

import optax
from jaxtyping import PyTree

from ngjax.metatrain.tasks import Task
from ngjax.metatrain.unroll import Schedule
from ngjax.optimizers import ng_learned_opt
from ngjax.optimizers.named_rules import Rule


@dataclasses.dataclass(frozen=True)
class LearnedOptimizer:
    """Makes `ng_learned_opt` from meta-parameters under training.

    Attributes:
      rule: as for `ng_learned_opt`.
      step: form of its step. With `"paper"` the learning rate is learned, and that of the run plays no part.
      chunk: as for `ng_learned_opt`.
    """

    rule: str | Rule = "ff"
    step: Literal["normalized", "paper"] = "normalized"
    chunk: int | None = None

    def __call__(self, theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
        rate = learning_rate if self.step == "normalized" else None
        return ng_learned_opt(
            self.rule, spec=task.spec(), meta_params=theta, step=self.step, learning_rate=rate, chunk=self.chunk
        )


def adam(theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
    """Adam in the place of a learned optimizer, to compare with."""
    del theta, task
    return optax.adam(learning_rate)
