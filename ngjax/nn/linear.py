"""A linear map of the last axis, and the precision of what follows it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
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


class DenseParams(nn.Module):
    """Kernel and bias of a linear map, initialized and named as in `Dense`, for those who compute with parts of it."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "inputs features"], Float[Array, " features"]]:
        """The parameters for inputs of so many features."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs, self.features), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


def linear(
    x: Float[Array, "... c"], kernel: Float[Array, "c d"], precision: str | None = None
) -> Float[Array, "... d"]:
    """`x @ kernel` as one product of two matrices, see `Dense`."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def linear_halves(
    x: Float[Array, "... c"], kernel: Float[Array, "c both"]
) -> tuple[Float[Array, "... d"], Float[Array, "... d"]]:
    """The two halves of `x @ kernel`.

    One product going forward, two going backward: putting the two derivatives together, as JAX would, costs as much as
    a product in XLA's CPU code.
    """
    first, second = jnp.split(linear(x, kernel), 2, axis=-1)
    return first, second


def _linear_halves_fwd(x: Array, kernel: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return linear_halves(x, kernel), (x, kernel)


def _linear_halves_bwd(saved: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, kernel = saved
    halves = jnp.split(kernel, 2, axis=-1)
    rows = x.reshape(-1, x.shape[-1])
    flat = [cotangent.reshape(-1, cotangent.shape[-1]) for cotangent in cotangents]
    of_x = flat[0] @ halves[0].T + flat[1] @ halves[1].T
    return of_x.reshape(x.shape), jnp.concatenate([rows.T @ cotangent for cotangent in flat], axis=-1)


linear_halves.defvjp(_linear_halves_fwd, _linear_halves_bwd)
