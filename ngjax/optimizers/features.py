"""What a learned optimizer reads of every scalar parameter: value, gradient and momenta, on a scale of their logarithm.

The features of the learned optimizers of Kofinas et al. (2024), appendix, after Andrychowicz et al. (2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

MOMENTUM_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
NUM_FEATURES = 2 * (2 + len(MOMENTUM_DECAYS))
"""Length of the feature axis: two for each of value, gradient and momenta."""

PREPROCESS_P = 10


def update_momenta(momenta: Sequence[Float[Array, "*s"]], gradient: Float[Array, "*s"]) -> tuple[Array, ...]:
    """`m <- decay m + g` for each of `MOMENTUM_DECAYS`: a sum, without bias correction, in float32."""
    gradient = gradient.astype(jnp.float32)
    return tuple(decay * m + gradient for decay, m in zip(MOMENTUM_DECAYS, momenta, strict=True))


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
