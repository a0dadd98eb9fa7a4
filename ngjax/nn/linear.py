"""A linear map of the last axis, and the precision of what follows it."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class LinearMap(NamedTuple):
    """A linear map of the last axis, as arrays: what is computed with it may be another map than it."""

    kernel: Float[Array, "in out"]
    bias: Float[Array, " out"]

    def __call__(self, x: Float[Array, "... in"], dtype: Any) -> Float[Array, "... out"]:
        """Maps every vector, computing in `dtype`."""
        return linear(x.astype(dtype), self.kernel.astype(dtype)) + self.bias.astype(dtype)

    def astype(self, dtype: Any) -> LinearMap:
        """The map in this dtype."""
        return LinearMap(*(part.astype(dtype) for part in self))

    def after(self, first: LinearMap | None) -> LinearMap:
        """The map that does `first`, and then this one, in a single product; `None` does nothing."""
        if first is None:
            return self
        kernel, bias = (jnp.matmul(part, self.kernel, precision="highest") for part in first)
        return LinearMap(kernel, bias + self.bias)


class DeclareLinearMap(nn.Module):
    """Declares the parameters of `Dense`, by default with its initial values, for those who compute otherwise."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: int) -> LinearMap:
        """The map of vectors with so many features."""
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features), jnp.float32)
        return LinearMap(kernel, self.param("bias", self.bias_init, (self.features,), jnp.float32))
