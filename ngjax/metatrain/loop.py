"""Meta-training: outer steps over a family of tasks, on one device or many, resumable."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ngjax import train
from ngjax.metatrain.estimators import Estimator
from ngjax.metatrain.tasks import TaskData
from ngjax.metatrain.unroll import Trainer
from ngjax.train.checkpoint import CHECKPOINTS_NAME, METRICS_NAME
from ngjax.train.loop import SaveSchedule
from ngjax.train.metrics import Row

_START, _STEP = 0, 1  # what keys of the run are folded with, first of all


class MetaState(NamedTuple):
    """What every outer step changes.

    Attributes:
      step: outer steps done.
      theta: the meta-parameters.
      opt_state: of the outer optimizer.
    """

    step: Int[Array, ""]
    theta: PyTree
    opt_state: PyTree


class MetaResult(NamedTuple):
    """What meta-training leaves.

    Attributes:
      theta: the meta-parameters after the last step.
      history: a row for every outer step, those before a resumption included.
    """

    theta: PyTree
    history: list[Row]


class _Saved(NamedTuple):
    """What a checkpoint holds: all that the rest of the run depends on."""

    state: MetaState
    pools: tuple[Any, ...]  # of each task: the estimator's members, leaves [runs, ...]
    key: PRNGKeyArray


@functools.partial(
    jax.jit,
    static_argnames=("trainer", "estimator", "optimizer", "mesh", "runs_at_once"),
    donate_argnames=("state", "pool"),
)
def outer_step(
    state: MetaState,
    pool: Any,
    key: PRNGKeyArray,
    data: TaskData,
    *,
    trainer: Trainer,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    runs_at_once: int,
) -> tuple[MetaState, Any, dict[str, Float[Array, ""]]]:
    """One update of the meta-parameters, from all runs of one task. Compiled once for each set of static arguments.

    Args:
      state: before the step; donated.
      pool: donated; the estimator's members, leaves `[runs, ...]`, shared out over the devices of the mesh.
      key: of the whole run; that of the step is folded from it.
      data: of the task.
      trainer: task, optimizer and settings of its runs; static.
      estimator: of the gradient; static.
      optimizer: of the meta-parameters; static.
      mesh: made by `ngjax.train.data_mesh`; static.
      runs_at_once: runs that a device computes side by side; the others of its share follow. Static.

    Returns:
      The state and the pool after the step, and the estimator's metrics, averaged over the runs, with `grad_norm`.
    """
    runs = jax.tree.leaves(pool)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, _STEP), state.step), runs)

    def of_share(theta: PyTree, members: Any, keys: Array, data: TaskData) -> Any:
        estimate = jax.lax.map(
            lambda pair: estimator.estimate(trainer, theta, pair[0], pair[1], data),
            (members, keys),
            batch_size=None if runs_at_once == 1 else runs_at_once,
        )
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (estimate.gradient, estimate.metrics))
        return estimate.member, jax.lax.pmean(mean, train.DATA_AXIS)

    everywhere, shared = jax.P(), jax.P(train.DATA_AXIS)
    pool, (gradient, metrics) = jax.shard_map(
        of_share,
        mesh=mesh,
        in_specs=(everywhere, shared, shared, everywhere),
        out_specs=(shared, everywhere),
        check_vma=False,
    )(state.theta, pool, keys, data)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    # Left to itself, XLA may shard it, and the next step would compile again.
    new = jax.lax.with_sharding_constraint(MetaState(state.step + 1, theta, opt_state), NamedSharding(mesh, everywhere))
    return new, pool, {**metrics, "grad_norm": optax.tree.norm(gradient)}


def meta_train(
    trainers: Sequence[Trainer],
    data: Mapping[str, TaskData],
    theta: PyTree,
    *,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    runs: int,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    runs_at_once: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    if_exists: train.IfExists = "refuse",
    save_every: int | None = None,
    save_every_seconds: float | None = 300.0,
    keep: int = 2,
) -> MetaResult:
    """Trains meta-parameters for `num_steps` outer steps, each on one task of the family, in turn.

    Every task has a pool of runs of its own, which go on from one outer step on the task to the next. The runs are
    shared out over the devices; how many there are changes nothing but the last bits. A run that was killed and is
    started again with `if_exists="resume"` and the same arguments ends, on CPU, with the same bits.

    Args:
      trainers: one for each task, with an optimizer that takes meta-parameters like `theta`.
      data: by the name in `task.data`.
      theta: initial meta-parameters.
      estimator: of the gradient.
      optimizer: of the meta-parameters, any optax transformation.
      num_steps: outer steps of the whole run, those before a resumption included.
      runs: in the pool of each task; a multiple of the number of devices.
      key: of the run.
      mesh: made by `ngjax.train.data_mesh`; all devices by default.
      runs_at_once: runs that a device computes side by side; by default one on CPU, where what it needs then stays in
        cache, and elsewhere all of its share.
      directory: folder of the run, see `ngjax.train.prepare_folder`; `None` keeps everything in memory.
      if_exists: what to do when the folder holds a run already.
      save_every: outer steps between checkpoints; `None` leaves it to the clock. The last one is saved in any case.
      save_every_seconds: between checkpoints; `None` leaves it to `save_every`.
      keep: how many of the latest checkpoints to keep.

    Raises:
      ValueError: no tasks; runs that the devices cannot share equally; horizons that the estimator does not take; a
        folder whose run has another key, other shapes or more steps.
      FileExistsError, OSError: see `ngjax.train.prepare_folder`.
      FloatingPointError: the meta-loss or its gradient is not finite.
    """
    mesh = train.data_mesh() if mesh is None else mesh
    if not trainers:
        raise ValueError("no tasks to train on")
    if runs < 1 or runs % mesh.size:
        raise ValueError(f"runs={runs}: expected a multiple of {mesh.size}, the number of devices")
    if runs_at_once is None:
        runs_at_once = 1 if mesh.devices.flat[0].platform == "cpu" else runs // mesh.size
    data = {name: train.replicate(value, mesh) for name, value in data.items()}

    static = {"trainers": tuple(trainers), "estimator": estimator, "optimizer": optimizer, "runs": runs}
    like = jax.eval_shape(functools.partial(_fresh, **static), theta, key, data)
    places = NamedSharding(mesh, jax.P()), NamedSharding(mesh, jax.P(train.DATA_AXIS)), NamedSharding(mesh, jax.P())
    shardings: Any = _Saved(*(jax.tree.map(lambda _, s=s: s, part) for part, s in zip(like, places, strict=True)))

    with contextlib.ExitStack() as stack:
        checkpoints, write, history = None, None, []
        if directory is not None:
            folder = train.prepare_folder(directory, if_exists)
            checkpoints = train.Checkpoints(folder / CHECKPOINTS_NAME, keep=keep)
            stack.callback(checkpoints.close)
        if checkpoints is not None and checkpoints.steps:
            saved = _restored(checkpoints, like, shardings, key)
        else:
            saved = jax.jit(functools.partial(_fresh, **static), out_shardings=shardings)(theta, key, data)
        state, pools = saved.state, list(saved.pools)
        start = int(state.step)
        if start > num_steps:
            raise ValueError(f"{directory} holds a run of {start} outer steps, but num_steps={num_steps}")
        if directory is not None:
            history = train.read_metrics(folder / METRICS_NAME, last_step=start)
            if jax.process_index() == 0:
                metrics_file = train.MetricsFile(folder / METRICS_NAME, history)
                stack.callback(metrics_file.close)
                write = metrics_file.write
        progress = train.Progress(num_steps, sys.stderr if jax.process_index() == 0 else None)
        stack.callback(progress.close)
        finish = functools.partial(_finish, progress=progress, history=history, write=write)

        saves = SaveSchedule(save_every, save_every_seconds, look_every=1)
        in_flight: tuple[int, int, Mapping[str, Array]] | None = None
        for step in range(start + 1, num_steps + 1):
            number = (step - 1) % len(trainers)
            state, pools[number], metrics = outer_step(
                state,
                pools[number],
                saved.key,
                data[trainers[number].task.data],
                trainer=trainers[number],
                estimator=estimator,
                optimizer=optimizer,
                mesh=mesh,
                runs_at_once=runs_at_once,
            )
            # Only now that the next step is dispatched, so that the device never waits for us.
            if in_flight is not None:
                finish(*in_flight)
            in_flight = step, number, metrics
            saving = checkpoints is not None and (step == num_steps or saves.is_due(step))
            if saving or step == num_steps:
                # Its row is written before its checkpoint: a restored run has all rows up to its step.
                finish(*in_flight)
                in_flight = None
            if checkpoints is not None and saving:
                checkpoints.save(step, _Saved(state, tuple(pools), saved.key))
    return MetaResult(state.theta, history)


def _fresh(
    theta: PyTree,
    key: PRNGKeyArray,
    data: Mapping[str, TaskData],
    *,
    trainers: Sequence[Trainer],
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    runs: int,
) -> _Saved:
    """What meta-training starts from."""

    def pool(number: int, trainer: Trainer) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, _START), number), runs)
        return jax.vmap(lambda key: estimator.start(trainer, theta, key, data[trainer.task.data]))(keys)

    # Copied, so that donating the state spares the caller's.
    state = MetaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, theta), optimizer.init(theta))
    return _Saved(state, tuple(pool(i, trainer) for i, trainer in enumerate(trainers)), key)


def paper_optimizer(num_steps: int, peak_rate: float = 3e-4) -> optax.GradientTransformation:
    """The outer optimizer of Kofinas et al. 2024: Adam along a cosine to zero, with L2 weight decay of 1e-4.

    The decay is added to the gradient, as `weight_decay` of PyTorch's Adam does.

    Args:
      num_steps: outer steps, at whose end the cosine is at zero.
      peak_rate: where the cosine starts; the paper's by default.
    """
    return optax.chain(optax.add_decayed_weights(1e-4), optax.adam(optax.cosine_decay_schedule(peak_rate, num_steps)))


def _finish(
    step: int,
    task: int,
    metrics: Mapping[str, Array],
    *,
    progress: train.Progress,
    history: list[Row],
    write: Callable[[Row], None] | None,
) -> None:
    """Waits for an outer step, checks and logs it."""
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(numbers[name]):
            raise FloatingPointError(f"{name} of outer step {step} is {numbers[name]}")
    progress.update(step, numbers["loss"])
    row: Row = {"step": step, "time": time.time(), "task": task, **numbers}
    history.append(row)
    if write is not None:
        write(row)


def _restored(checkpoints: train.Checkpoints, like: _Saved, shardings: _Saved, key: PRNGKeyArray) -> _Saved:
    """The latest checkpoint, which must be of a run with these shapes and this key."""
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, shardings
    )
    saved: _Saved = checkpoints.restore(checkpoints.steps[-1], placed)
    if not np.array_equal(jax.random.key_data(saved.key), jax.random.key_data(key)):
        raise ValueError(f"{checkpoints.directory} holds a run with another key")
    return saved
