"""How well an optimizer trains fresh optimizees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ngjax.metatrain.tasks import Batch, TaskData
from ngjax.metatrain.unroll import Trainer, start_run, unroll

TEST_ROWS = 1000
"""At most so many of the test examples are looked at, the first ones."""


class Outcome(NamedTuple):
    """Of runs with each of several peak rates (P), from each of several seeds (S).

    Attributes:
      train_losses: on a fresh batch after each step.
      test_loss, test_accuracy: after the last step.
    """

    train_losses: Float[np.ndarray, "P S steps"]
    test_loss: Float[np.ndarray, "P S"]
    test_accuracy: Float[np.ndarray, "P S"]

    def best(self) -> int:
        """The number of the peak rate whose test loss is lowest, in the mean over the seeds; NaN is not."""
        return int(np.argmin(np.nan_to_num(self.test_loss.mean(axis=1), nan=np.inf)))


def evaluate(
    trainer: Trainer,
    theta: PyTree,
    data: TaskData,
    *,
    key: PRNGKeyArray,
    num_steps: int,
    peak_rates: Sequence[float],
    num_seeds: int,
) -> Outcome:
    """Trains optimizees as they are, without reparametrization, and tests them.

    Args:
      trainer: task, optimizer and settings of the runs, of which the warm-up alone matters.
      theta: meta-parameters.
      data: of the task.
      key: of the seeds; each peak rate meets the same ones.
      num_steps: of each run.
      peak_rates: of the learning rate.
      num_seeds: runs with each peak rate.
    """
    settings = dataclasses.replace(trainer.settings, horizons=(num_steps,), scale_spread=1.0)
    trainer = dataclasses.replace(trainer, settings=settings)
    keys = jax.random.split(key, num_seeds)
    peaks = jnp.asarray(peak_rates, jnp.float32)
    losses, test_loss, test_accuracy = _evaluate(theta, data, keys, peaks, trainer=trainer, num_steps=num_steps)
    return Outcome(np.asarray(losses), np.asarray(test_loss), np.asarray(test_accuracy))


@functools.partial(jax.jit, static_argnames=("trainer", "num_steps"))
def _evaluate(
    theta: PyTree, data: TaskData, keys: Array, peaks: Array, *, trainer: Trainer, num_steps: int
) -> tuple[Array, Array, Array]:
    test = Batch(data.test.inputs[:TEST_ROWS], data.test.labels[:TEST_ROWS])

    def one(peak: Array, key: Array) -> tuple[Array, Array, Array]:
        run = start_run(trainer, theta, key, data)._replace(peak=peak)
        run, losses = unroll(trainer, theta, run, data, num_steps)
        return losses, trainer.task.loss(run.params, test), trainer.task.accuracy(run.params, test)

    return jax.lax.map(lambda peak: jax.lax.map(lambda key: one(peak, key), keys), peaks)
