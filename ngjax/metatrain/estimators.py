"""Gradients with respect to meta-parameters, estimated from runs that go on from one outer step to the next.

An estimator looks after one member of a pool of runs: `start` makes it; `estimate` starts it anew where it has come to
its end, trains it a little further, and says in which direction the meta-parameters should go.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ngjax.metatrain.tasks import Batch, TaskData
from ngjax.metatrain.unroll import (
    LARGEST_LOSS,
    Run,
    Trainer,
    check_horizons,
    is_over,
    meta_loss,
    no_run,
    restart_if,
    start_run,
    take_step,
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


@runtime_checkable
class Estimator(Protocol):
    """A way to estimate meta-gradients; static, so hashable."""

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Any:
        """A member of the pool before its first outer step."""

    def estimate(self, trainer: Trainer, theta: PyTree, member: Any, key: PRNGKeyArray, data: TaskData) -> Estimate:
        """An outer step of one member; `key` is new at each."""


@dataclasses.dataclass(frozen=True)
class OneStep:
    """The gradient of the losses after the steps of a truncation, each on a fresh batch, through single steps.

    See `unroll_with_gradient`.

    Attributes:
      truncation: steps between two updates of the meta-parameters, a divisor of all horizons; memory grows with it, see
        `unroll_with_gradient`.
      credit_decay: of what a step is credited with, for each step until the loss; from 0 to 1. With 0, only the loss
        right after it counts, and what is learned is greedy: good after few steps, and behind Adam after many.
      equal_runs: give the gradient of each run a norm of one. It is proportional to the learning rate of the run, and
        tasks differ in it as much, so that otherwise few runs decide.
    """

    truncation: int = 50
    credit_decay: float = 1.0
    equal_runs: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.credit_decay <= 1:
            raise ValueError(f"credit_decay: expected 0 to 1, received {self.credit_decay}")

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Run:
        check_horizons(trainer.settings, self.truncation)
        return no_run(trainer, theta, key, data)

    def estimate(self, trainer: Trainer, theta: PyTree, member: Run, key: PRNGKeyArray, data: TaskData) -> Estimate:
        run = restart_if(is_over(member), start_run(trainer, theta, key, data), member)
        run, losses, gradient = unroll_with_gradient(trainer, theta, run, data, self.truncation, self.credit_decay)
        if self.equal_runs:
            norm = optax.tree.norm(gradient)
            # Zero where nothing is left to learn from: a run that has diverged.
            gradient = jax.tree.map(lambda g: g / jnp.where(norm > 0, norm, 1), gradient)
        return Estimate(run, gradient, run_metrics(losses))


def run_metrics(losses: Float[Array, "..."]) -> dict[str, Float[Array, ""]]:
    """Of the losses `[..., steps]` after each step: meta-loss, and the share of runs that have diverged at the end."""
    last = losses[..., -1]
    return {
        "loss": jnp.mean(meta_loss(losses)),
        "last_loss": jnp.mean(meta_loss(last)),
        "diverged": jnp.mean((~(last < LARGEST_LOSS)).astype(jnp.float32)),
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
      truncation: steps between two updates of the meta-parameters, a divisor of all horizons.
      deviation: standard deviation of `e`.
    """

    truncation: int = 50
    deviation: float = 0.01

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Pair:
        check_horizons(trainer.settings, self.truncation)
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
    return jax.tree.unflatten(treedef, drawn)


# -- the paper's scheme ------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """Where a member is in its passes over the data.

    Attributes:
      key: of the orders.
      position: batches read.
    """

    key: PRNGKeyArray
    position: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class PaperScheme:
    """Meta-training as in Kofinas et al. 2024 (arXiv 2403.12143), section 4.3 and its code.

    A fresh optimizee in every outer step. The loss after each update is taken on the batch that the update was made
    from, and its gradients through single steps are summed up. The batches are those of shuffled passes over the data,
    which go on from one outer step to the next. Learning rates and settings of runs play no part; `loss` is the mean
    cross entropy after the steps, `last_loss` that after the last one.

    Attributes:
      inner_steps: of each optimizee.
    """

    inner_steps: int = 100

    def start(self, trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Stream:
        return Stream(key, jnp.int32(0))

    def estimate(self, trainer: Trainer, theta: PyTree, member: Stream, key: PRNGKeyArray, data: TaskData) -> Estimate:
        task = trainer.task
        value_and_grad = jax.value_and_grad(task.loss)

        def optimizer_of(theta: PyTree) -> optax.GradientTransformation:
            return trainer.make_optimizer(theta, task, lambda count: jnp.ones_like(count, jnp.float32))

        def step(carry: tuple[PyTree, PyTree, PyTree], rows: Array) -> tuple[tuple[PyTree, PyTree, PyTree], Array]:
            params, opt_state, total = carry
            batch = Batch(data.train.inputs[rows], data.train.labels[rows])
            _, gradient = value_and_grad(params, batch)
            params, opt_state, pullback = take_step(optimizer_of, theta, gradient, opt_state, params)
            loss, after = value_and_grad(params, batch)
            return (params, opt_state, jax.tree.map(jnp.add, total, pullback(after)[0])), loss

        params = task.init(key)
        start = (params, optimizer_of(theta).init(params), jax.tree.map(jnp.zeros_like, theta))
        rows = epoch_rows_from(member, len(data.train.labels), task.batch_size, self.inner_steps)
        (_, _, total), losses = jax.lax.scan(step, start, rows)
        return Estimate(
            Stream(member.key, member.position + self.inner_steps),
            total,
            {"loss": jnp.mean(losses), "last_loss": losses[-1]},
        )


def epoch_rows_from(stream: Stream, num_rows: int, batch_size: int, num_steps: int) -> Int[Array, "steps batch"]:
    """The rows of the next batches of shuffled passes over the data.

    What is left over at the end of a pass and fills no batch is not read.

    Raises:
      ValueError: a batch that is larger than the data.
    """
    batches = num_rows // batch_size
    if batches < 1:
        raise ValueError(f"batch_size: expected 1 to {num_rows}, the number of rows; received {batch_size}")
    # One more pass than it takes, as the first may be far gone.
    passes = stream.position // batches + jnp.arange(math.ceil(num_steps / batches) + 1)
    orders = jax.vmap(lambda number: jax.random.permutation(jax.random.fold_in(stream.key, number), num_rows))(passes)
    rows = orders[:, : batches * batch_size].reshape(-1, batch_size)
    return jax.lax.dynamic_slice_in_dim(rows, stream.position % batches, num_steps)
