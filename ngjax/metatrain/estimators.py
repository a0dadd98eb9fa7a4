"""Gradients with respect to meta-parameters, estimated from runs that go on from one outer step to the next.

An estimator looks after one member of a pool of runs: `start` makes it; `estimate` starts it anew where it has come to
its end, trains it a little further, and says in which direction the meta-parameters should go.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ngjax.metatrain.tasks import TaskData
from ngjax.metatrain.unroll import (
    Run,
    Trainer,
    is_over,
    meta_loss,
    no_run,
    restart_if,
    start_run,
    unroll,
    unroll_with_gradient,
)


class Estimate(NamedTuple):
    """What one member of the pool contributes to an outer step.

    Attributes:
      member: of the pool, for the next time.
      gradient: of the meta-loss, like the meta-parameters.
      metrics: scalars; `loss` is what is minimized.
    """

    member: Any
    gradient: PyTree
    metrics: dict[str, Float[Array, ""]]


class Estimator(Protocol):
    """A way to estimate meta-gradients; static, so hashable."""

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Any:
        """A member of the pool before its first outer step."""

    def estimate(self, trainer: Trainer, theta: PyTree, member: Any, key: PRNGKeyArray, data: TaskData) -> Estimate:
        """An outer step of one member; `key` is new at each."""


@dataclasses.dataclass(frozen=True)
class OneStep:
    """The gradient of the loss after each step, on a fresh batch, through this one step.

    Attributes:
      truncation: steps between two updates of the meta-parameters.
    """

    truncation: int = 50

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Run:
        return no_run(trainer, theta, key, data)

    def estimate(self, trainer: Trainer, theta: PyTree, member: Run, key: PRNGKeyArray, data: TaskData) -> Estimate:
        run = restart_if(is_over(member), start_run(trainer, theta, key, data), member)
        run, losses, gradient = unroll_with_gradient(trainer, theta, run, data, self.truncation)
        return Estimate(run, gradient, run_metrics(losses))


def run_metrics(losses: Float[Array, "..."]) -> dict[str, Float[Array, ""]]:
    """Of the losses `[..., steps]` after each step: meta-loss, and the share of runs that have diverged at the end."""
    last = meta_loss(losses[..., -1])
    return {
        "loss": jnp.mean(meta_loss(losses)),
        "last_loss": jnp.mean(last),
        "diverged": jnp.mean((last >= meta_loss(jnp.inf)).astype(jnp.float32)),
    }


class Pair(NamedTuple):
    """Two runs that differ in the sign of what the meta-parameters are perturbed by, and in nothing else.

    Attributes:
      runs: leaves `[2, ...]`, the one with the perturbations added first.
      noise: sum of the perturbations since the runs began, like the meta-parameters.
    """

    runs: Run
    noise: PyTree


@dataclasses.dataclass(frozen=True)
class PES:
    """Persistent evolution strategies (Vicol et al. 2021, arXiv 2112.13835, algorithm 2).

    Of every pair of runs, one has the meta-parameters `theta + e`, the other `theta - e`, with a fresh `e` in every
    truncation. The difference of their losses, times the sum of all `e` since the runs began, estimates the gradient
    of the smoothed loss through whole runs, and not only through a truncation. A pair starts anew together.

    Attributes:
      truncation: steps between two updates of the meta-parameters.
      deviation: standard deviation of `e`.
    """

    truncation: int = 50
    deviation: float = 0.01

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Pair:
        return fresh_pair(theta, no_run(trainer, theta, key, data))

    def estimate(self, trainer: Trainer, theta: PyTree, member: Pair, key: PRNGKeyArray, data: TaskData) -> Estimate:
        start_key, noise_key = jax.random.split(key)
        over = jnp.any(jax.vmap(is_over)(member.runs))
        pair = restart_if(over, fresh_pair(theta, start_run(trainer, theta, start_key, data)), member)
        noise = gaussian_like(noise_key, theta, self.deviation)
        perturbed = jax.tree.map(lambda t, e: jnp.stack([t + e, t - e]), theta, noise)
        runs, losses = jax.vmap(lambda theta, run: unroll(trainer, theta, run, data, self.truncation))(
            perturbed, pair.runs
        )
        total = jax.tree.map(jnp.add, pair.noise, noise)
        plus, minus = jnp.mean(meta_loss(losses), axis=-1)
        slope = (plus - minus) / (2 * self.deviation**2)
        return Estimate(Pair(runs, total), jax.tree.map(lambda e: slope * e, total), run_metrics(losses))


def fresh_pair(theta: PyTree, run: Run) -> Pair:
    """The same run twice, without perturbations so far."""
    return Pair(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), run), jax.tree.map(jnp.zeros_like, theta))


def gaussian_like(key: PRNGKeyArray, tree: PyTree, deviation: float) -> PyTree:
    """Independent normal numbers for all leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [deviation * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten(drawn)
