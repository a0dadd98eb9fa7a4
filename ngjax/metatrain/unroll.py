"""Training an optimizee with a learned optimizer, and what each of its steps says of the meta-parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ngjax.metatrain.tasks import Batch, Task, TaskData, draw_scales, rescale, sample_batch, unscale

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
"""From the number of steps done to the learning rate of the next one."""

LOSS_FLOOR = 1e-2
"""Added to losses before their logarithm: below it a run is trained, and the logarithm of its loss mostly noise."""

LARGEST_LOSS = 1e3
"""Runs above it have diverged."""


OptimizerMaker = Callable[[PyTree, Task, Schedule], optax.GradientTransformation]
"""Makes the optimizer under training from its meta-parameters, the task and the learning rate of a run.

It is static, so hashable; the meta-parameters are traced, and so is what the schedule closes over."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What runs are drawn from.

    Attributes:
      horizons: steps of a run, each as likely.
      peak_rates: smallest and largest peak of the learning rate, between which its logarithm is uniform.
      warmup: share of the horizon over which the learning rate rises to its peak. A cosine down to zero follows.
      scale_spread: largest of the scales `s` of the tensors in `p = s q`, where the optimizer sees `q` in place of `p`;
        the smallest is its inverse, see `draw_scales`. One leaves the optimizees as they are.
    """

    horizons: tuple[int, ...] = (50, 100, 200, 400)
    peak_rates: tuple[float, float] = (1e-3, 1e-1)
    warmup: float = 0.05
    scale_spread: float = 10.0


def check_horizons(settings: RunSettings, truncation: int) -> None:
    """Raises where a run would end within a truncation: the steps after its end teach nothing, and would count.

    Raises:
      ValueError: a horizon that is no multiple of the truncation.
    """
    for horizon in settings.horizons:
        if horizon % truncation:
            raise ValueError(f"horizons={settings.horizons}: expected multiples of truncation={truncation}")


class Run(NamedTuple):
    """An optimizee on its way, between two steps.

    Attributes:
      params: `q`, what the optimizer sees; the network has the parameters `scales * q`.
      scales: one number for each tensor.
      opt_state: of the optimizer.
      loss: at `params`, on the batch that the next step learns from.
      gradient: of that loss.
      count: steps done.
      horizon: steps of the whole run.
      peak: of the learning rate.
      key: of the batches.
    """

    params: PyTree
    scales: PyTree
    opt_state: PyTree
    loss: Float[Array, ""]
    gradient: PyTree
    count: Int[Array, ""]  # type: ignore[assignment]  # a method of tuples has the name too
    horizon: Int[Array, ""]
    peak: Float[Array, ""]
    key: PRNGKeyArray


def warmup_cosine(
    peak: Float[Array, ""], horizon: Int[Array, ""], warmup: float, count: Int[Array, ""]
) -> Float[Array, ""]:
    """The learning rate of step `count` of `horizon`, counted from 0; above zero at all of them, also if traced.

    Args:
      peak: reached after the share `warmup` of the horizon.
      horizon: steps of the run.
      warmup: between 0 and 1, exclusive.
      count: steps done.
    """
    share = (count.astype(jnp.float32) + 1) / (horizon.astype(jnp.float32) + 1)
    decayed = jnp.clip((share - warmup) / (1 - warmup), 0, 1)
    return peak * jnp.minimum(share / warmup, 1) * (1 + jnp.cos(jnp.pi * decayed)) / 2


def meta_loss(loss: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The logarithm of losses, so that the steps of a trained network count as much as those of a fresh one."""
    # A loss that is not a number is that of a run that has diverged.
    return jnp.log(jnp.where(loss < LARGEST_LOSS, loss, LARGEST_LOSS) + LOSS_FLOOR)


def is_over(run: Run) -> Bool[Array, ""]:
    """Whether the run is at its horizon or has diverged."""
    return (run.count >= run.horizon) | ~(run.loss < LARGEST_LOSS)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What all steps of a run share; static.

    Attributes:
      task: architecture, loss and data of the optimizee.
      make_optimizer: the optimizer under training.
      settings: of the runs.
    """

    task: Task
    make_optimizer: OptimizerMaker
    settings: RunSettings = RunSettings()

    def optimizer(self, theta: PyTree, peak: Float[Array, ""], horizon: Int[Array, ""]) -> optax.GradientTransformation:
        """With the learning rates of a run."""

        def rate(count: Int[Array, ""]) -> Float[Array, ""]:
            return warmup_cosine(peak, horizon, self.settings.warmup, count)

        return self.make_optimizer(theta, self.task, rate)

    def loss_and_gradient(self, params: PyTree, scales: PyTree, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
        """Of the network `scales * params`, with respect to `params`."""
        return jax.value_and_grad(lambda q: self.task.loss(rescale(scales, q), batch))(params)


def start_run(trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Run:
    """A fresh optimizee, with horizon, peak and scales of its own."""
    task, settings = trainer.task, trainer.settings
    init_key, scale_key, peak_key, horizon_key, first_key, key = jax.random.split(key, 6)
    initial = task.init(init_key)
    scales = draw_scales(scale_key, initial, settings.scale_spread)
    params = unscale(scales, initial)
    low, high = jnp.log(jnp.asarray(settings.peak_rates, jnp.float32))
    peak = jnp.exp(jax.random.uniform(peak_key, minval=low, maxval=high))
    horizon = jax.random.choice(horizon_key, jnp.asarray(settings.horizons, jnp.int32))
    loss, gradient = trainer.loss_and_gradient(params, scales, sample_batch(first_key, data.train, task.batch_size))
    opt_state = trainer.optimizer(theta, peak, horizon).init(params)
    return Run(params, scales, opt_state, loss, gradient, jnp.int32(0), horizon, peak, key)


def no_run(trainer: Trainer, theta: PyTree, key: PRNGKeyArray, data: TaskData) -> Run:
    """A run that is over, in the shapes of others: what a pool holds before its first runs."""
    # Without its key, as keys have no zeros.
    like = jax.eval_shape(lambda: start_run(trainer, theta, key, data)._replace(key=jnp.uint32(0)))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)._replace(key=key)


Pullback = Callable[[PyTree], tuple[PyTree]]
"""From a gradient with respect to new parameters to one with respect to the meta-parameters of the step there."""


def take_step(
    optimizer_of: Callable[[PyTree], optax.GradientTransformation],
    theta: PyTree,
    gradient: PyTree,
    opt_state: PyTree,
    params: PyTree,
) -> tuple[PyTree, PyTree, Pullback]:
    """New parameters, new state of the optimizer, and what the step owes to its meta-parameters.

    The pullback counts what the optimizer reads (parameters, gradient, momenta) as constant.
    """

    def updates_of(theta: PyTree) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return optimizer_of(theta).update(gradient, opt_state, params)

    updates, pullback, new_state = jax.vjp(updates_of, theta, has_aux=True)
    return optax.apply_updates(params, updates), new_state, pullback


def step_run(trainer: Trainer, theta: PyTree, run: Run, data: TaskData) -> Run:
    """The run after one step of the optimizer, with loss and gradient of where it leads, on a fresh batch."""

    def optimizer_of(theta: PyTree) -> optax.GradientTransformation:
        return trainer.optimizer(theta, run.peak, run.horizon)

    params, opt_state, _ = take_step(optimizer_of, theta, run.gradient, run.opt_state, run.params)
    batch = sample_batch(jax.random.fold_in(run.key, run.count), data.train, trainer.task.batch_size)
    loss, gradient = trainer.loss_and_gradient(params, run.scales, batch)
    return run._replace(params=params, opt_state=opt_state, loss=loss, gradient=gradient, count=run.count + 1)


def unroll(
    trainer: Trainer, theta: PyTree, run: Run, data: TaskData, length: int
) -> tuple[Run, Float[Array, " length"]]:
    """`length` steps, and the loss after each of them, on a fresh batch."""

    def step(run: Run, _: None) -> tuple[Run, Array]:
        run = step_run(trainer, theta, run, data)
        return run, run.loss

    return jax.lax.scan(step, run, None, length)


def unroll_with_gradient(
    trainer: Trainer, theta: PyTree, run: Run, data: TaskData, length: int, credit_decay: float
) -> tuple[Run, Float[Array, " length"], PyTree]:
    """As `unroll`, with a gradient with respect to the meta-parameters.

    It is the mean, over the steps, of the gradient of `meta_loss` after the step, through this one step, and through
    those before it in the unroll, times `credit_decay` for each step in between: a step is credited with what it does
    to later losses too. What the optimizer reads counts as constant (Andrychowicz et al. 2016, section 2), so that the
    optimizee costs no more than without: the gradient that the next step learns from says all that is needed. Updates
    are computed once more on the way back; parameters, gradients and state of the optimizer are kept of every step.

    Args:
      trainer: static.
      theta: meta-parameters.
      run: to go on with.
      data: of the task.
      length: steps.
      credit_decay: from 0, where only the loss right after a step counts, up to 1.

    Returns:
      The run after the steps, the loss after each of them, and the gradient.
    """

    def step(run: Run, _: None) -> tuple[Run, tuple[tuple[PyTree, PyTree, PyTree], Array]]:
        new = step_run(trainer, theta, run, data)
        return new, ((run.gradient, run.opt_state, run.params), new.loss)

    def step_back(
        carry: tuple[PyTree, PyTree, PyTree], step: tuple[tuple[PyTree, PyTree, PyTree], Array]
    ) -> tuple[tuple[PyTree, PyTree, PyTree], None]:
        total, credit, after = carry
        before, loss = step
        weight = jax.grad(meta_loss)(loss)
        # Where a run has diverged there is nothing to learn, but the steps before that are still to learn from.
        credit = finite_or_zero(jax.tree.map(lambda g, c: weight * g + credit_decay * c, after, credit))
        _, _, pullback = take_step(lambda theta: trainer.optimizer(theta, run.peak, run.horizon), theta, *before)
        total = jax.tree.map(jnp.add, total, finite_or_zero(pullback(credit)[0]))
        return (total, credit, before[0]), None

    last, (befores, losses) = jax.lax.scan(step, run, None, length)
    nothing = jax.tree.map(jnp.zeros_like, theta), jax.tree.map(jnp.zeros_like, run.gradient)
    (total, *_), _ = jax.lax.scan(step_back, (*nothing, last.gradient), (befores, losses), reverse=True)
    return last, losses, jax.tree.map(lambda g: g / length, total)


def finite_or_zero(tree: PyTree) -> PyTree:
    """The tree if all of it is finite, else zeros: a run that diverges says nothing, and spoils no other's gradient."""
    is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
    return jax.tree.map(lambda leaf: jnp.where(is_finite, leaf, jnp.zeros_like(leaf)), tree)


def restart_if(condition: Bool[Array, ""], fresh: Any, old: Any) -> Any:
    """`fresh` where the condition holds, else `old`."""
    return jax.tree.map(lambda new, kept: jnp.where(condition, new, kept), fresh, old)
