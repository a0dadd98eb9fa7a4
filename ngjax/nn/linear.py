"""A linear map of the last axis, and the precision of what follows it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def at_least_float32(dtype: Any) -> Any:
    """The dtype for sums, exponentials and angles: the given one, or float32 where that is less precise."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


class Dense(nn.Dense):
    """`flax.linen.Dense` on one matrix of all vectors.

    The same numbers; but XLA's CPU code for a product with many leading axes, and for its derivative, is several times
    slower than that for two.
    """

    promote_dtype: Any = nn.dtypes.promote_dtype  # flax's own annotation cannot be checked at run time

    def __call__(self, inputs: Float[Array, "... C"]) -> Float[Array, "... D"]:
        """Maps every vector along the last axis."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], self.features)


def linear(
    x: Float[Array, "... c"], kernel: Float[Array, "c d"], precision: str | None = None
) -> Float[Array, "... d"]:
    """`x @ kernel` as one product of two matrices, see `Dense`."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])
