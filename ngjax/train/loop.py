"""The loop that every script shares."""

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from ngjax.train.checkpoint import (
    CHECKPOINTS_NAME,
    METRICS_NAME,
    Checkpoints,
    IfExists,
    prepare_folder,
)
from ngjax.train.mesh import DATA_AXIS, data_mesh, replicate, shard_batch
from ngjax.train.metrics import MetricsFile, Row, read_metrics
from ngjax.train.progress import Progress
from ngjax.train.step import LossFn, TrainState, init_state, train_step


class FitResult(NamedTuple):
    """What a finished run leaves."""

    state: TrainState  # after the last step, replicated over the mesh
    history: list[Row]  # every logged step, those before a resumption included


class _Saved(NamedTuple):
    """What a checkpoint holds; the position in the data is `state.step`."""

    state: TrainState
    key: PRNGKeyArray


def fit(
    loss_fn: LossFn,
    params: PyTree,
    batch_at: Callable[[int], Any],
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    micro_batch: int | None = None,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    log_every: int = 100,
    directory: str | os.PathLike[str] | None = None,
    if_exists: IfExists = "refuse",
    save_every: int | None = None,
    save_every_seconds: float | None = 600.0,
    keep: int = 3,
) -> FitResult:
    """Trains `params` for `num_steps` steps; with a folder, resumable at any moment.

    A run that was killed and is started again with `if_exists="resume"` and the same arguments
    ends with the parameters, bit for bit, that it would have ended with (on CPU), and its metrics
    file has each logged step once. That needs `batch_at` to be a function of the step alone.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> (loss, metrics)`, see `LossFn`. Compiled once per
        shape of the batch.
      params: the initial parameters; not donated. Unused but for shapes when a run is resumed.
      batch_at: `batch_at(step)` is the batch of the next step after `step` steps are done: a
        pytree of arrays `[rows, ...]`, on several processes only this one's `local_rows`. Called
        while the device is busy with the step before.
      optimizer: any optax transformation.
      num_steps: steps of the whole run, those before a resumption included.
      key: key of the run; each step's is folded from it.
      mesh: made by `data_mesh`; all devices of all processes by default.
      micro_batch: rows whose gradient a device computes at a time, see `micro_batch_gradients`; `None` takes all of its
        share at once.
      evaluate: `evaluate(params)` gives named numbers, logged as `eval/<name>`. Called on every
        process, every `eval_every` steps and once at the end. The params are donated to the next
        step: keep no reference to them.
      eval_every: steps between evaluations; `None` evaluates at the end only.
      log_every: steps between rows of metrics. Steps with an evaluation and the last are logged
        too.
      directory: folder of the run, see `prepare_folder`; `None` keeps everything in memory.
      if_exists: what to do when the folder holds a run already.
      save_every: steps between checkpoints; `None` leaves it to the clock. The last step is saved
        in any case.
      save_every_seconds: seconds between checkpoints, looked at every `log_every` steps; `None`
        leaves it to `save_every`.
      keep: how many of the latest checkpoints to keep.

    Returns:
      The final state and the rows of the metrics file.

    Raises:
      FileExistsError, OSError: see `prepare_folder`.
      ValueError: a count below one, a mesh with other axes, a batch the devices cannot share, or a
        folder whose run has another key, other parameters or more steps.
      FloatingPointError: the loss is not finite. The state before it is not saved.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> def loss_fn(params, batch, key):
      ...     return jnp.mean((batch @ params) ** 2), {}
      >>> result = fit(
      ...     loss_fn, jnp.ones(3), lambda step: np.eye(3, dtype=np.float32),
      ...     optimizer=optax.sgd(0.5), num_steps=2, key=jax.random.key(0),
      ...     mesh=data_mesh(jax.devices()[:1]),
      ... )
      >>> [round(row["loss"], 4) for row in result.history]
      [0.4444]
    """
    for name, count in {
        "num_steps": num_steps,
        "micro_batch": micro_batch,
        "eval_every": eval_every,
        "log_every": log_every,
        "save_every": save_every,
        "keep": keep,
    }.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    mesh = data_mesh() if mesh is None else mesh
    if mesh.axis_names != (DATA_AXIS,):
        raise ValueError(f"the mesh has axes {mesh.axis_names}, expected {(DATA_AXIS,)}")
    is_writer = jax.process_index() == 0

    with contextlib.ExitStack() as stack:
        checkpoints: Checkpoints | None = None
        metrics_file: MetricsFile | None = None
        history: list[Row] = []
        if directory is None:
            state, key = _fresh(params, optimizer, key, mesh)
        else:
            folder = prepare_folder(directory, if_exists)
            checkpoints = Checkpoints(folder / CHECKPOINTS_NAME, keep=keep)
            stack.callback(checkpoints.close)
            if checkpoints.steps:
                state, key = _restored(checkpoints, params, optimizer, key, mesh)
            else:
                state, key = _fresh(params, optimizer, key, mesh)
            history = read_metrics(folder / METRICS_NAME, last_step=int(state.step))
            if is_writer:
                metrics_file = MetricsFile(folder / METRICS_NAME, history)
                stack.callback(metrics_file.close)
        start = int(state.step)
        if start > num_steps:
            raise ValueError(f"{directory} holds a run of {start} steps, but num_steps={num_steps}")

        progress = Progress(num_steps, sys.stderr if is_writer else None)
        stack.callback(progress.close)
        saves = SaveSchedule(save_every, save_every_seconds, look_every=log_every)
        # The state comes back as it went in. Left to itself, XLA may shard parameters that meet the
        # rows of the batch, and the next step would compile again.
        step_fn = jax.jit(
            functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, mesh=mesh, micro_batch=micro_batch),
            donate_argnums=0,
            out_shardings=NamedSharding(mesh, jax.P()),
        )

        def finish(step: int, metrics: Mapping[str, Array]) -> dict[str, float]:
            """Waits for a step and checks its loss."""
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not math.isfinite(numbers["loss"]):
                raise FloatingPointError(f"the loss of step {step} is {numbers['loss']}")
            progress.update(step, numbers["loss"])
            return numbers

        def log(step: int, numbers: Mapping[str, float]) -> None:
            row: Row = {"step": step, "time": time.time(), **numbers}
            history.append(row)
            if metrics_file is not None:
                metrics_file.write(row)

        in_flight: tuple[int, Mapping[str, Array]] | None = None
        for step in range(start + 1, num_steps + 1):
            batch = shard_batch(batch_at(step - 1), mesh)
            state, metrics = step_fn(state, batch, key)
            # Only now that the next step is dispatched, so that the device never waits for us.
            if in_flight is not None:
                numbers = finish(*in_flight)
                if in_flight[0] % log_every == 0:
                    log(in_flight[0], numbers)
            in_flight = step, metrics

            last = step == num_steps
            evaluating = evaluate is not None and (last or _is_due(eval_every, step))
            saving = checkpoints is not None and (last or saves.is_due(step))
            if not (last or evaluating or saving):
                continue
            # Evaluation and saving read this step's state, so it has to be finished first. Its row
            # is written before its checkpoint: a restored run has all rows up to its step.
            numbers = finish(step, metrics)
            in_flight = None
            if evaluate is not None and evaluating:
                with progress.paused():
                    results = evaluate(state.params)
                numbers |= {f"eval/{name}": float(value) for name, value in results.items()}
            if last or evaluating or step % log_every == 0:
                log(step, numbers)
            if checkpoints is not None and saving:
                checkpoints.save(step, _Saved(state, key))
    return FitResult(state, history)


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class SaveSchedule:
    """When to save: every so many steps, or once so many seconds have passed on process 0."""

    def __init__(self, every_steps: int | None, every_seconds: float | None, *, look_every: int) -> None:
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._look_every = look_every
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        due = _is_due(self._every_steps, step)
        if self._every_seconds is not None and step % self._look_every == 0:
            # All processes have to save together, and their clocks differ.
            elapsed = time.monotonic() - self._last >= self._every_seconds
            due |= bool(multihost_utils.broadcast_one_to_all(np.asarray(elapsed)))
        if due:
            self._last = time.monotonic()
        return due


def _fresh(params: PyTree, optimizer: optax.GradientTransformation, key: PRNGKeyArray, mesh: Mesh) -> _Saved:
    return replicate(_Saved(init_state(params, optimizer), key), mesh)


def _restored(
    checkpoints: Checkpoints,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    mesh: Mesh,
) -> _Saved:
    """The latest checkpoint, which must be of a run with these parameters and this key."""
    sharding = NamedSharding(mesh, jax.P())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: _Saved(init_state(params, optimizer), key)),
    )
    saved: _Saved = checkpoints.restore(checkpoints.steps[-1], like)
    if not np.array_equal(jax.random.key_data(saved.key), jax.random.key_data(key)):
        raise ValueError(f"{checkpoints.directory} holds a run with another key")
    return saved
