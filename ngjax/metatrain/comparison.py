"""Optimizers side by side on a task: their runs, what is read off the losses, and what an update costs."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ngjax.metatrain.optimizers import LearnedOptimizer, adam
from ngjax.metatrain.tasks import Batch, Task, TaskData
from ngjax.metatrain.unroll import OptimizerMaker, Run, RunSettings, Schedule, Trainer, start_run, unroll
from ngjax.optimizers.meta_file import MetaFile, load_meta_params
from ngjax.optimizers.meta_params import checked_meta_params
from ngjax.optimizers.named_rules import Rule, find_rule
from ngjax.spec import flatten_with_path, format_path

LAST_STEPS = 10
"""The final training loss of a run is the mean over so many steps at its end."""

WINDOW = 20
"""Steps of the running mean through which curves are looked at."""

DIVERGED_ABOVE = 2.0
"""A run has diverged if it ends above this many times the loss of the fresh network, or at no number at all."""

ADAMW_DECAY = 1e-2
SGD_MOMENTUM = 0.9

_TEST_BATCH = 1000

# -- who takes part ---------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """An optimizer that takes part.

    Attributes:
      name: in tables.
      make_optimizer: from meta-parameters, task and learning rate; hashable.
      theta: meta-parameters; empty for optimizers made by hand.
      has_rate: whether it has a learning rate, which has to be tuned.
      is_learned: whether meta-training made it.
      version: of the meta-parameters, see `fingerprint`; empty for optimizers made by hand.
    """

    name: str
    make_optimizer: OptimizerMaker
    theta: PyTree
    has_rate: bool = True
    is_learned: bool = False
    version: str = ""


def adamw(theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
    """AdamW with the weight decay that is PyTorch's default, see `ADAMW_DECAY`."""
    del theta, task
    return optax.adamw(learning_rate, weight_decay=ADAMW_DECAY)


def sgd(theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum, see `SGD_MOMENTUM`."""
    del theta, task
    return optax.sgd(learning_rate, momentum=SGD_MOMENTUM)


def muon(theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
    """Muon on matrices (Jordan et al. 2024), Adam on all else, as `optax` has it."""
    del theta, task
    return optax.contrib.muon(learning_rate)


HAND_MADE: dict[str, OptimizerMaker] = {"adam": adam, "adamw": adamw, "sgd": sgd, "muon": muon}
"""Optimizers by the names that `hand_made` knows."""


def hand_made(name: str) -> Candidate:
    """One of `HAND_MADE`.

    Raises:
      ValueError: an unknown name.
    """
    if name not in HAND_MADE:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(HAND_MADE)}, and files of meta-parameters")
    return Candidate(name, HAND_MADE[name], {})


def learned(path: str | os.PathLike[str]) -> Candidate:
    """What `scripts/meta_train.py` has written, named after its folder; after the file if that has a name of its own.

    In the paper's form of the step it has no learning rate.

    Raises:
      ValueError: not such a file, or meta-parameters that fit no rule of the name there.
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path).absolute()
    file = load_meta_params(path)
    for key in ("rule", "step"):
        if key not in file.metadata:
            raise ValueError(f"{path} does not say which {key} its meta-parameters are of")
    step = file.metadata["step"]
    return Candidate(
        name=path.parent.name if path.stem == "meta_params" else path.stem,
        make_optimizer=LearnedOptimizer(_rule_of(path, file), step),
        theta=file.theta,
        has_rate=step != "paper",
        is_learned=True,
        version=fingerprint(file),
    )


def fingerprint(file: MetaFile) -> str:
    """Sixteen hexadecimal digits of arrays, rule and step; when and how they were made is not in them."""
    digest = hashlib.sha256(f"{file.metadata['rule']} {file.metadata['step']}".encode())
    for leaf_path, leaf in flatten_with_path(file.theta)[0]:
        digest.update(f"{format_path(leaf_path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _rule_of(path: pathlib.Path, file: MetaFile) -> Rule:
    """The rule that the file names, which has to have meta-parameters like those in it."""
    try:
        rule = find_rule(file.metadata["rule"], file.metadata["step"])
        checked_meta_params(rule, file.theta)
    except ValueError as error:
        raise ValueError(f"{path} does not hold meta-parameters of {file.metadata['rule']}: {error}") from None
    return rule


# -- runs -------------------------------------------------------------------------------------------------------------

ScheduleName: TypeAlias = Literal["cosine", "constant"]


class ConstantRateTrainer(Trainer):
    """A trainer whose runs keep their peak rate from the first step to the last, as in Kofinas et al. 2024."""

    def optimizer(self, theta: PyTree, peak: Float[Array, ""], horizon: Int[Array, ""]) -> optax.GradientTransformation:
        del horizon

        def rate(count: Int[Array, ""]) -> Float[Array, ""]:
            del count
            return peak

        return self.make_optimizer(theta, self.task, rate)


_TRAINERS: dict[ScheduleName, type[Trainer]] = {"cosine": Trainer, "constant": ConstantRateTrainer}


def make_trainer(candidate: Candidate, task: Task, schedule: ScheduleName, num_steps: int) -> Trainer:
    """Trainer of networks as they are, without reparametrization, for `num_steps` steps each.

    Args:
      candidate: the optimizer.
      task: what it trains.
      schedule: of the learning rate: `"cosine"` after a warm-up, or `"constant"`.
      num_steps: of each run, at whose end a cosine is at zero.
    """
    return _TRAINERS[schedule](task, candidate.make_optimizer, RunSettings(horizons=(num_steps,), scale_spread=1.0))


class RunResult(NamedTuple):
    """Of one network.

    Attributes:
      first_loss: of the fresh network, on a training batch.
      train_losses: after each step, on the batch of the next one.
      test_loss, test_accuracy: after the last step, on all test examples.
    """

    first_loss: float
    train_losses: Float[np.ndarray, " steps"]
    test_loss: float
    test_accuracy: float


def run_once(trainer: Trainer, theta: PyTree, data: TaskData, *, peak_rate: float, seed: int) -> RunResult:
    """Trains a fresh network and tests it. Networks and batches depend on task and seed alone.

    Compiled once for all rates and seeds. They are not mapped over inside: each run can be kept as soon as it is done,
    and a run on a CPU is no faster with others at its side.

    Args:
      trainer: made by `make_trainer`.
      theta: meta-parameters of the optimizer.
      data: of the task.
      peak_rate: of the learning rate.
      seed: of network and batches.
    """
    start = _start(data, jax.random.key(seed), task=trainer.task)
    params, losses = _train(theta, data, start, jnp.asarray(peak_rate, jnp.float32), trainer=trainer)
    test_loss, test_accuracy = _test(trainer.task, params, data.test)
    return RunResult(float(start.loss), np.asarray(losses), test_loss, test_accuracy)


def _no_optimizer(theta: PyTree, task: Task, learning_rate: Schedule) -> optax.GradientTransformation:
    del theta, task, learning_rate
    return optax.identity()


# Apart from the steps: drawing parameters takes longer to compile than these, and is the same for all optimizers.
@functools.partial(jax.jit, static_argnames="task")
def _start(data: TaskData, key: PRNGKeyArray, *, task: Task) -> Run:
    return start_run(Trainer(task, _no_optimizer, RunSettings(scale_spread=1.0)), {}, key, data)


@functools.partial(jax.jit, static_argnames="trainer")
def _train(
    theta: PyTree, data: TaskData, start: Run, peak: Float[Array, ""], *, trainer: Trainer
) -> tuple[PyTree, Float[Array, " steps"]]:
    (num_steps,) = trainer.settings.horizons
    horizon = jnp.int32(num_steps)
    state = trainer.optimizer(theta, peak, horizon).init(start.params)
    run = start._replace(opt_state=state, peak=peak, horizon=horizon)
    run, losses = unroll(trainer, theta, run, data, num_steps)
    return run.params, losses


def _test(task: Task, params: PyTree, rows: Batch) -> tuple[float, float]:
    """Loss and accuracy, from parts that fit into memory."""
    count = len(rows.labels)
    total = np.zeros(2)
    for first in range(0, count, _TEST_BATCH):
        part = Batch(rows.inputs[first : first + _TEST_BATCH], rows.labels[first : first + _TEST_BATCH])
        total += len(part.labels) * np.array(jax.device_get(_loss_and_accuracy(params, part, task=task)), np.float64)
    loss, accuracy = total / count
    return float(loss), float(accuracy)


@functools.partial(jax.jit, static_argnames="task")
def _loss_and_accuracy(params: PyTree, rows: Batch, *, task: Task) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return task.loss(params, rows), task.accuracy(params, rows)


# -- what is read off the losses --------------------------------------------------------------------------------------


def running_mean(losses: Float[np.ndarray, "*runs steps"]) -> Float[np.ndarray, "*runs places"]:
    """Means over `WINDOW` consecutive steps, or over all of them if they are fewer; in float64.

    The first one ends at step `steps - places + 1`, counted from 1, and the last one with the run.
    """
    width = min(WINDOW, losses.shape[-1])
    windows = np.lib.stride_tricks.sliding_window_view(losses.astype(np.float64), width, axis=-1)
    return windows.mean(axis=-1)


def final_loss(result: RunResult) -> float:
    """The mean training loss over the last `LAST_STEPS` steps."""
    return float(np.mean(result.train_losses[-LAST_STEPS:], dtype=np.float64))


def has_diverged(result: RunResult) -> bool:
    """See `DIVERGED_ABOVE`."""
    return not final_loss(result) <= DIVERGED_ABOVE * result.first_loss  # what is not a number is not below either


def tuning_loss(results: Sequence[RunResult]) -> float:
    """What learning rates are chosen by: the mean over runs of the running mean at their end.

    It is infinite if any of them has diverged.
    """
    if any(has_diverged(result) for result in results):
        return float("inf")
    return float(np.mean([running_mean(result.train_losses)[-1] for result in results]))


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate with the lowest `tuning_loss`; the smallest one of several."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def steps_to_reach(losses: Float[np.ndarray, " steps"], target: float) -> int | None:
    """Steps until the running mean is at `target` or below; `None` if it never is.

    Args:
      losses: after each step, of a run or in the mean over several.
      target: a loss.
    """
    curve = running_mean(losses)
    reached = np.flatnonzero(curve <= target)
    return len(losses) - len(curve) + 1 + int(reached[0]) if len(reached) else None


def step_reduction(losses: Float[np.ndarray, " steps"], baseline: Float[np.ndarray, " steps"]) -> float | None:
    """How many times fewer steps than the baseline an optimizer takes to the baseline's final loss.

    Steps of both are counted by `steps_to_reach`, as noise may take the baseline there before its end.

    Args:
      losses: after each step, of a run or in the mean over several.
      baseline: the same of the optimizer to compare with.

    Returns:
      The factor; `None` if the loss is never reached.
    """
    target = float(running_mean(baseline)[-1])
    steps, own = steps_to_reach(losses, target), steps_to_reach(baseline, target)
    return None if steps is None or own is None else own / steps


# -- costs ------------------------------------------------------------------------------------------------------------


class UpdateCost(NamedTuple):
    """Of one update, without the gradient that it starts from.

    Attributes:
      milliseconds: median over repetitions.
      state_bytes: the optimizer's state.
      temporary_bytes: what the compiled update needs beside arguments and results; `None` where the compiler does not
        say.
    """

    milliseconds: float
    state_bytes: int
    temporary_bytes: int | None


def update_cost(trainer: Trainer, theta: PyTree, data: TaskData) -> UpdateCost:
    """Of the update, compiled alone, on the gradient of a fresh network."""
    fresh = _start(data, jax.random.key(0), task=trainer.task)
    gradient, params = fresh.gradient, fresh.params
    (num_steps,) = trainer.settings.horizons

    def optimizer(theta: PyTree) -> optax.GradientTransformation:
        return trainer.optimizer(theta, jnp.float32(1e-3), jnp.int32(num_steps))

    def update(theta: PyTree, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return optimizer(theta).update(gradient, state, params)

    state = optimizer(theta).init(params)
    compiled = jax.jit(update).lower(theta, gradient, state, params).compile()
    memory = compiled.memory_analysis()
    return UpdateCost(
        milliseconds=median_milliseconds(lambda: compiled(theta, gradient, state, params)),
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
    )


def gradient_milliseconds(task: Task, data: TaskData) -> float:
    """Median time of loss and gradient of the network on one batch, compiled."""
    params = _start(data, jax.random.key(0), task=task).params
    batch = jax.tree.map(lambda rows: rows[: task.batch_size], data.train)
    compiled = jax.jit(jax.value_and_grad(task.loss)).lower(params, batch).compile()
    return median_milliseconds(lambda: compiled(params, batch))


def median_milliseconds(call: Callable[[], Any], *, seconds: float = 1.0, least: int = 10, most: int = 200) -> float:
    """Median wall time of a call, after two to warm up.

    Args:
      call: returns arrays, which are waited for.
      seconds: stop repeating after about as many,
      least: but not before so many repetitions,
      most: and at so many in any case.
    """
    for _ in range(2):
        jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) < seconds):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))
