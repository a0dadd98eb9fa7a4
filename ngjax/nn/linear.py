"""A linear map of the last axis."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float


class Dense(nn.Dense):
    """`flax.linen.Dense` on one matrix of all vectors.

    The same numbers; but XLA's CPU code for a product with many leading axes, and for its derivative, is several times
    slower than that for two.
    """

    def __call__(self, inputs: Float[Array, "... C"]) -> Float[Array, "... D"]:
        """Maps every vector along the last axis."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], self.features)
