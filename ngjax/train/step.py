"""One optimization step as a pure function, and the optimizer the reference models train with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ngjax.train.mesh import DATA_AXIS

LossFn: TypeAlias = Callable[[Any, Any, PRNGKeyArray], tuple[Float[Array, ""], Mapping[str, Array]]]
"""`loss_fn(params, batch, key) -> (loss, metrics)`: what a step minimizes and what it reports.

`loss` is the mean over the rows of the batch, so that it does not depend on how many devices share
them. `metrics` holds further scalars to be logged. Whatever is not trained is closed over.
"""


class TrainState(NamedTuple):
    """All that a step changes, and with the key all that a resumed run needs."""

    step: Int[Array, ""]  # steps done; also the position in the data and the fold of the key
    params: PyTree
    opt_state: PyTree


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Args:
      params: pytree of arrays. They are copied, so that donating the state spares the caller's.
      optimizer: any optax transformation.
    """
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    # Leaf by leaf, since some optimizers keep the parameters themselves in their state and no
    # buffer can be donated twice.
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def micro_batch_gradients(loss_fn: LossFn, mesh: Mesh, rows: int) -> Callable:
    """Value and gradient of a loss, a few rows of the batch at a time.

    Every device takes its share of the batch in pieces of so many rows, one after the other, and sums their gradients
    up. Activations are those of one piece: on an accelerator that bounds memory, on CPU they stay in cache.

    Args:
      loss_fn: see `LossFn`; a mean over rows. The metrics are averaged as well. Each piece receives a key of its own,
        which depends on its place in the batch and not on the device.
      mesh: over whose devices the rows of the batch are shared out.
      rows: of a piece; the share of every device is a multiple of it.

    Returns:
      A function `(params, batch, key) -> ((loss, metrics), gradients)`.

    Raises:
      ValueError: when called with a batch whose shares are not multiples of `rows`.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def of_share(params: PyTree, share: PyTree, key: PRNGKeyArray) -> Any:
        size = jax.tree.leaves(share)[0].shape[0]
        if size % rows:
            raise ValueError(f"every device has {size} rows of the batch, expected a multiple of micro_batch={rows}")
        count = size // rows
        pieces = jax.tree.map(lambda leaf: leaf.reshape(count, rows, *leaf.shape[1:]), share)
        first = lax.axis_index(DATA_AXIS) * count

        def of_piece(index: Array) -> Any:
            piece = jax.tree.map(lambda leaf: leaf[index], pieces)
            return value_and_grad(params, piece, jax.random.fold_in(key, first + index))

        def add(total: PyTree, index: Array) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, of_piece(index)), None

        like = jax.eval_shape(of_piece, jnp.int32(0))
        total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        total, _ = lax.scan(add, total, jnp.arange(count))
        return lax.pmean(jax.tree.map(lambda leaf: leaf / count, total), DATA_AXIS)

    everywhere, by_rows = jax.P(), jax.P(DATA_AXIS)
    return jax.shard_map(
        of_share, mesh=mesh, in_specs=(everywhere, by_rows, everywhere), out_specs=everywhere, check_vma=False
    )


def train_step(
    state: TrainState,
    batch: PyTree,
    key: PRNGKeyArray,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    micro_batch: int | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step: gradient of the loss, then the optimizer's update.

    Args:
      state: before the step.
      batch: what `loss_fn` takes.
      key: the key of the run, the same at every step. The loss receives `fold_in(key, step)`, so a
        resumed run draws what an uninterrupted one would have drawn.
      loss_fn: see `LossFn`.
      optimizer: its update also receives `value=loss`, for those that ask for it.
      mesh: of the batch; needed for micro-batches alone.
      micro_batch: rows whose gradient a device computes at a time, see `micro_batch_gradients`.

    Returns:
      The state after the step, and the scalars `loss` and `grad_norm` (before clipping) together
      with those of `loss_fn`. All of them belong to the parameters before the step.

    Raises:
      ValueError: `loss_fn` returns a metric of a reserved name or one that is not a scalar;
        micro-batches without a mesh.
    """
    if micro_batch is None:
        value_and_grad: Callable = jax.value_and_grad(loss_fn, has_aux=True)
    elif mesh is None:
        raise ValueError(f"micro_batch={micro_batch} needs the mesh of the batch")
    else:
        value_and_grad = micro_batch_gradients(loss_fn, mesh, micro_batch)
    (loss, named), grads = value_and_grad(state.params, batch, jax.random.fold_in(key, state.step))
    own = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    for name, value in named.items():
        if name in own:
            raise ValueError(f"loss_fn returns a metric named {name!r}, which the step reports")
        if jnp.shape(value) != ():
            raise ValueError(f"metric {name!r} has shape {jnp.shape(value)}, expected a scalar")
    # Optax mixes dtypes as NumPy does, also where the caller asked JAX for strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, value=loss
        )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {**own, **named}


def learning_rate_schedule(
    peak: float, *, warmup_steps: int = 0, total_steps: int | None = None
) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """Linear warm-up, then constant, or with `total_steps` a cosine down to zero.

    Step k, counted from 1, runs at `peak * k / warmup_steps` while k < warmup_steps. Optax counts
    from 0: the schedule takes k - 1.

    Args:
      peak: the learning rate after warm-up.
      warmup_steps: W above; 0 and 1 mean none.
      total_steps: the step after which the cosine has reached zero; `None` stays at `peak`.

    Raises:
      ValueError: `total_steps` leaves no step after warm-up.
    """
    if total_steps is not None and total_steps <= warmup_steps:
        raise ValueError(f"total_steps={total_steps} leaves no step after warmup_steps={warmup_steps}")

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        done = jnp.asarray(count, jnp.float32)
        rate = peak * jnp.minimum((done + 1) / max(warmup_steps, 1), 1)
        if total_steps is None:
            return rate
        decayed = (done - warmup_steps) / (total_steps - warmup_steps)
        return rate * (1 + jnp.cos(jnp.pi * jnp.clip(decayed, 0, 1))) / 2

    return schedule


def make_optimizer(
    learning_rate: float = 1e-3,
    *,
    weight_decay: float = 5e-4,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    clip_norm: float | None = 10.0,
    amsgrad: bool = True,
) -> optax.GradientTransformation:
    """AdamW as the reference models are trained with it; the defaults are theirs.

    Args:
      learning_rate: after warm-up.
      weight_decay: decoupled and scaled by the learning rate, on every parameter.
      warmup_steps: see `learning_rate_schedule`.
      total_steps: see `learning_rate_schedule`.
      clip_norm: largest global norm of the gradient; `None` does not clip.
      amsgrad: divide by the largest second moment so far (Reddi et al., arXiv 1904.09237).

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = make_optimizer(1e-3, warmup_steps=1000)
      >>> opt_state = optimizer.init({"w": jnp.zeros(3)})
    """
    rate = learning_rate_schedule(learning_rate, warmup_steps=warmup_steps, total_steps=total_steps)
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        _scale_by_amsgrad() if amsgrad else optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _scale_by_amsgrad(b2: float = 0.999) -> optax.GradientTransformation:
    """AMSGrad as PyTorch has it, where the maximum is taken before the bias correction.

    Optax corrects first. The correction of step 1 is a factor of 1000, so the square of the very
    first gradient, uncorrected in every later comparison, would bound the step size for good.
    """
    return optax.chain(
        optax.scale_by_amsgrad(b2=b2, bias_correction_nu=False),
        optax.scale_by_schedule(lambda count: jnp.sqrt(1 - b2 ** (jnp.asarray(count, jnp.float32) + 1))),
    )
