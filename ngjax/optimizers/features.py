"""What a learned optimizer reads of every scalar parameter: numbers made from its value, gradient and momenta.

`SCALAR_FEATURES` are those of the learned optimizers of Kofinas et al. (2024), appendix, after Andrychowicz et al.
(2016): each on a scale of its logarithm. `NORMALIZED_FEATURES` are after Celo2 (Moudgil et al. 2026, arXiv 2602.19142):
each relative to its tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

MOMENTUM_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
NUM_FEATURES = 2 * (2 + len(MOMENTUM_DECAYS))
"""Length of the feature axis: two for each of value, gradient and momenta."""

PREPROCESS_P = 10

FACTORED_DECAYS = (0.9, 0.99, 0.999)
NUM_NORMALIZED = 1 + 2 * (1 + len(MOMENTUM_DECAYS)) + 1 + len(FACTORED_DECAYS)
"""Length of the feature axis of `normalized_features`."""

LARGEST_NORMALIZED = 10.0
SMALLEST_MARGINAL = 1e-6
SMALLEST_MEAN_SQUARE = 1e-12


def update_momenta(momenta: Sequence[Float[Array, "*s"]], gradient: Float[Array, "*s"]) -> tuple[Array, ...]:
    """`m <- decay m + g` for each of `MOMENTUM_DECAYS`: a sum, without bias correction, in float32."""
    gradient = gradient.astype(jnp.float32)
    return tuple(decay * m + gradient for decay, m in zip(MOMENTUM_DECAYS, momenta, strict=True))


def had_gradient(momenta: Sequence[Float[Array, "*s"]]) -> Bool[Array, "*s"]:
    """Which scalars ever had a gradient that was not zero, as far as their updated momenta remember."""
    return functools.reduce(jnp.logical_or, [m != 0 for m in momenta])


def log_sign(x: Float[Array, "... C"]) -> Float[Array, "... 2*C"]:
    """Two numbers of order one for numbers of any size, one after the other (Andrychowicz et al. 2016, appendix A).

    `(ln|x| / p, sign x)` where `|x| >= e^-p`, else `(-1, e^p x)`, with p = 10. Continuous, and finite for finite `x`.
    """
    size = jnp.abs(x)
    is_large = size >= math.exp(-PREPROCESS_P)
    # The logarithm also of what is not chosen has to be finite, or derivatives are NaN.
    logarithm = jnp.log(jnp.where(is_large, size, 1)) / PREPROCESS_P
    first = jnp.where(is_large, logarithm, -1)
    second = jnp.where(is_large, jnp.sign(x), x * math.exp(PREPROCESS_P))
    return jnp.stack([first, second], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])


def scalar_features(
    value: Float[Array, "*s"], gradient: Float[Array, "*s"], momenta: Sequence[Float[Array, "*s"]]
) -> Float[Array, "*s 14"]:
    """Features of every scalar of a parameter, in float32: value, gradient, momenta (the updated ones), each twice.

    Finite for all finite gradients whose momenta are: those of 1e30 stay so for any number of steps.
    """
    parts = [value.astype(jnp.float32), gradient.astype(jnp.float32), *momenta]
    return log_sign(jnp.stack(parts, axis=-1))


def unit_rms(x: Float[Array, "*s"], counted: Bool[Array, "*s"] | None = None) -> Float[Array, "*s"]:
    """A tensor divided by the root of the mean of its squares, for numbers of any size; zero where all are.

    The mean is over the scalars that are `counted`, by default all; the others have to be zero.
    """
    # Squares of what is at most one do not overflow. Below the smallest normal number a quotient may be 0 / 0.
    # The result does not depend on this number, so neither do derivatives.
    greatest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    x = x / jnp.where(greatest < jnp.finfo(x.dtype).tiny, 1, greatest)
    count = x.size if counted is None else jnp.sum(counted, dtype=x.dtype)
    mean_square = jnp.sum(x**2) / jnp.maximum(1, count)
    return x * jax.lax.rsqrt(jnp.maximum(mean_square, SMALLEST_MEAN_SQUARE))


def factored(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """A tensor of `unit_rms`, divided by the root of its squares as the means over all but one axis tell them.

    For a matrix this is Adafactor's estimate (Shazeer & Stern 2018), mean of the row times mean of the column, of the
    squares of this tensor; all axes count alike, so that kernels may be stored in any order. What has one axis becomes
    its sign, except near zero.
    """
    squares, result = x**2, x
    for axis in range(x.ndim):
        others = tuple(other for other in range(x.ndim) if other != axis)
        marginal = jnp.sum(squares, axis=others, keepdims=True) / max(1, math.prod(x.shape[i] for i in others))
        result = result * jax.lax.rsqrt(jnp.maximum(marginal, SMALLEST_MARGINAL))
    return result


def normalized_features(
    value: Float[Array, "*s"], gradient: Float[Array, "*s"], momenta: Sequence[Float[Array, "*s"]]
) -> Float[Array, "*s 17"]:
    """Features of every scalar of a parameter relative to its tensor, in float32, none greater than ten.

    They are, in this order,

    - value, gradient and momenta (the updated ones), each with a root mean square of one over the tensor;
    - gradient and momenta divided by their root mean square over the six: which of the time scales agree;
    - the gradient and the momenta of `FACTORED_DECAYS`, `factored`.

    Multiplying all gradients, or all values, by a number changes none of them. Finite where `scalar_features` are.
    """
    # One program for all of them: one each would be several times as much to compile and to start.
    relative = jax.vmap(unit_rms)(jnp.stack([x.astype(jnp.float32) for x in (value, gradient, *momenta)]))
    moving = jnp.moveaxis(relative[1:], 0, -1)
    mean_square = jnp.mean(moving**2, axis=-1, keepdims=True)
    agreement = moving * jax.lax.rsqrt(jnp.maximum(mean_square, SMALLEST_MEAN_SQUARE))
    chosen = np.array([1, *(2 + MOMENTUM_DECAYS.index(decay) for decay in FACTORED_DECAYS)])
    by_axes = jnp.moveaxis(jax.vmap(factored)(relative[chosen]), 0, -1)
    features = jnp.concatenate([relative[0][..., None], moving, agreement, by_axes], axis=-1)
    return jnp.clip(features, -LARGEST_NORMALIZED, LARGEST_NORMALIZED)


class FeatureSet(NamedTuple):
    """What a rule reads.

    Attributes:
      size: length of the feature axis.
      of: from value, gradient and updated momenta `[*shape]` of a parameter to its features `[*shape, size]`.
    """

    size: int
    of: Callable[..., Array]


SCALAR_FEATURES = FeatureSet(NUM_FEATURES, scalar_features)
NORMALIZED_FEATURES = FeatureSet(NUM_NORMALIZED, normalized_features)
