"""From the two numbers that a rule says of every scalar, direction `s` and magnitude `m`, to a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.optimizers.features import MOMENTUM_DECAYS, had_gradient, unit_rms

STEP_SCALE = 0.01
MAGNITUDE_SCALE = 0.01
NOMINAL_DECAY = 0.9
LEARNED_SCALE = 0.1
UNIT_WIDTH = 16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that brings singular values between 0 and 1 near one, by Jordan et al. (2024), *Muon*."""
NEWTON_SCHULZ_STEPS = 5


def paper_step(head: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """The update `0.01 s exp(0.01 m)` of direction `s` and magnitude `m`, to be added to the parameter."""
    return head[..., 0] * STEP_SCALE * jnp.exp(MAGNITUDE_SCALE * head[..., 1])


def normalized_step(
    head: Float[Array, "*s 2"], gradient: Float[Array, "*s"], momenta: Sequence[Float[Array, "*s"]]
) -> Float[Array, "*s"]:
    """A direction with a root mean square of `step_size` over the tensor; a learning rate multiplies it.

    It is the descent along Nesterov's momentum, brought to a root mean square of one, plus the learned direction
    `0.1 s exp(0.01 m)`; of matrices and kernels this is `orthogonalized`. Where nothing has been learned yet, `s` is
    zero, as with what `init_meta_params` draws: the step is then about that of Muon (Jordan et al. 2024). Momentum is a
    nominal term, as Harrison et al. (2022, arXiv 2209.11208) call it.

    Scalars that never had a gradient have direction zero and do not count in the mean: normalized, a rule's answer to
    no gradient at all would be a step as large as any other.

    Args:
      head: `s` and `m` of every scalar.
      gradient: of the tensor.
      momenta: the updated ones, for each of `MOMENTUM_DECAYS`.
    """
    moving = had_gradient(momenta)
    momentum = momenta[MOMENTUM_DECAYS.index(NOMINAL_DECAY)]
    nominal = unit_rms(gradient.astype(jnp.float32) + NOMINAL_DECAY * momentum, moving)
    learned = LEARNED_SCALE * head[..., 0] * jnp.exp(MAGNITUDE_SCALE * head[..., 1])
    direction = jnp.where(moving, learned - nominal, 0)
    return step_size(gradient.shape) * unit_rms(jnp.where(moving, orthogonalized(direction), 0), moving)


def step_size(shape: Sequence[int]) -> float:
    """Root mean square of a normalized step: one of vectors, `sqrt(16 / longest axis)` of matrices and kernels.

    What a step of a wide layer does to its outputs grows with the root of its width, if all numbers of it are as large
    as those of a narrow one; this is taken out, so that the same learning rate suits all widths (Yang et al. 2022,
    arXiv 2203.03466; Bernstein & Newhouse 2024, arXiv 2409.20325).
    """
    return math.sqrt(UNIT_WIDTH / max(shape)) if is_matrix(shape) else 1.0


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether more than one axis is longer than one."""
    return math.prod(shape) > max(shape, default=1)


def orthogonalized(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The tensor as a matrix whose singular values are near one, between 0.7 and 1.2 but for the smallest.

    The matrix has the longest axis against all others, the first of those equally long: of a dense layer its kernel, of
    a convolution usually the channels of one side against those of the other and the places, of an attention layer the
    features against the heads; kernels of several layers in one array are one matrix. Permuting an axis permutes the
    result. A tensor with a single axis longer than one is returned as it is.
    """
    if not is_matrix(x.shape):
        return x
    longest = x.shape.index(max(x.shape))
    moved = jnp.moveaxis(x, longest, -1)
    matrix = moved.reshape(-1, moved.shape[-1])
    is_tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if is_tall else matrix  # products with the shorter side are the smaller ones
    matrix = unit_rms(matrix) / math.sqrt(matrix.size)  # so that no singular value is above one
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        squares = matrix @ matrix.T
        matrix = a * matrix + (b * squares + c * squares @ squares) @ matrix
    matrix = matrix.T if is_tall else matrix
    return jnp.moveaxis(matrix.reshape(moved.shape), -1, longest)
