"""The perceptron that ends every rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.nn.linear import DeclareLinearMap, LinearMap


def map_scalars(layer: LinearMap, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
    """The map of what is known of each scalar."""
    # One product with all leading axes: merged into one, those of sharded parameters would have to be gathered.
    return x @ layer.kernel + layer.bias


def update_head(
    layers: Sequence[LinearMap], features: Float[Array, "*s C"], backbone: Float[Array, "... B"] | None = None
) -> Float[Array, "*s 2"]:
    """A perceptron on `[features, backbone]`.

    Args:
      layers: at least one; relu stands between them.
      features: of each scalar.
      backbone: what a rule adds to them. Its leading axes broadcast to those of `features`.

    Returns:
      Direction and magnitude, see `ngjax.optimizers.steps`.
    """
    kernel, bias = layers[0]
    num_features = features.shape[-1]
    if backbone is not None:
        # The product with each part alone: what many scalars share is multiplied once.
        bias = backbone @ kernel[num_features:] + bias
    x = features @ kernel[:num_features] + bias
    for layer in layers[1:]:
        x = map_scalars(layer, nn.relu(x))
    return x


def in_chunks(
    function: Callable[..., Float[Array, "... out"]],
    chunk: int,
    features: Float[Array, "*s C"],
    backbone: Float[Array, "... B"] | None,
) -> Float[Array, "*s out"]:
    """`function(features, backbone)`, for about `chunk` scalars at a time, whatever is in between only for so many."""
    # Scalars that share a row of the backbone, as those of a kernel do, stay together.
    split = features.ndim - 1
    if backbone is not None and backbone.ndim > 1:
        split = next((i for i in range(split) if backbone.shape[i] != features.shape[i]), split)
    rows = features.reshape(-1, *features.shape[split:])
    size = max(1, chunk // math.prod(rows.shape[1:-1]))
    if size >= len(rows):
        return function(features, backbone)
    # A derivative computes each chunk again, which costs less than keeping what is in between for all.
    function = jax.checkpoint(function)
    if backbone is None or backbone.ndim == 1:
        result = jax.lax.map(lambda row: function(row, backbone), rows, batch_size=size)
    else:
        of_rows = backbone.reshape(len(rows), *backbone.shape[split:])
        result = jax.lax.map(lambda row: function(*row), (rows, of_rows), batch_size=size)
    return result.reshape(*features.shape[:-1], result.shape[-1])


class UpdateHead(nn.Module):
    """The perceptron of `update_head`.

    The last layer starts with zeros, so that fresh meta-parameters say nothing of any scalar, and hidden layers as He
    et al. (2015, arXiv 1502.01852) propose. In the paper's code each hidden layer divides the variance of what it is
    given by six: fresh rules move all scalars alike, those with eight layers to within a percent, and networks are
    ruined before anything is learned.

    Attributes:
      width: of the hidden layers.
      num_hidden: hidden layers.
      dtype: of the computation; parameters and result are float32.
      chunk: scalars at a time, see `in_chunks`; `None` for all.
    """

    width: int
    num_hidden: int
    dtype: Any = jnp.float32
    chunk: int | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "*s C"], backbone: Float[Array, "... B"] | None = None
    ) -> Float[Array, "*s 2"]:
        """Arguments and result of `update_head`."""
        inputs = features.shape[-1] + (0 if backbone is None else backbone.shape[-1])
        widths = [inputs, *[self.width] * self.num_hidden, 2]
        layers = [self._declare(i, widths[i], widths[i + 1]) for i in range(self.num_hidden + 1)]
        layers = [layer.astype(self.dtype) for layer in layers]

        def function(features: Array, backbone: Array | None) -> Array:
            if backbone is not None:
                backbone = backbone.astype(self.dtype)
            return update_head(layers, features.astype(self.dtype), backbone).astype(jnp.float32)

        if self.chunk is None:
            return function(features, backbone)
        return in_chunks(function, self.chunk, features, backbone)

    def _declare(self, number: int, inputs: int, outputs: int) -> LinearMap:
        kernel_init = nn.initializers.zeros if number == self.num_hidden else nn.initializers.he_normal()
        return DeclareLinearMap(outputs, kernel_init, name=f"dense_{number}")(inputs)
