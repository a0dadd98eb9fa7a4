"""The MLP on flattened weights, a baseline that knows nothing of their symmetry.

It is what equivariant models of weights are compared with since Navon et al. 2023 (arXiv 2301.12780).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.baselines.mlp import MLP


class FlatStatistics(NamedTuple):
    """Mean and standard deviation of every weight over a set of networks, in the order of `flatten_params`."""

    mean: Float[Array, " D"]
    std: Float[Array, " D"]


def flatten_params(params: Any) -> Float[Array, "B D"]:
    """All weights of each network in one row, leaf after leaf in the order of the pytree.

    Args:
      params: pytree of leaves `[B, ...]`.

    Raises:
      ValueError: no leaves, or leaves whose first axes differ.
    """
    leaves = jax.tree.leaves(params)
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"params: expected leaves [B, ...] with the same B, received shapes {[x.shape for x in leaves]}"
        )
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=-1)


def flat_statistics(params: Any) -> FlatStatistics:
    """Statistics over the networks, of training networks say.

    Args:
      params: pytree of leaves `[B, ...]`.
    """
    flat = flatten_params(params)
    return FlatStatistics(flat.mean(axis=0), flat.std(axis=0))


class FlatMLP(nn.Module):
    """Standardized weights in one vector, then an MLP.

    Attributes:
      num_outputs: logits per network.
      hidden: widths of the relu layers.
    """

    num_outputs: int
    hidden: Sequence[int] = (512, 512)

    @nn.compact
    def __call__(self, params: Any, statistics: FlatStatistics) -> Float[Array, "B {self.num_outputs}"]:
        """Logits of networks.

        Args:
          params: pytree of leaves `[B, ...]`.
          statistics: by which every weight is standardized; one that never varies becomes 0.
        """
        varies = statistics.std > 0
        scale = jnp.where(varies, 1 / jnp.where(varies, statistics.std, 1), 0)
        return MLP((*self.hidden, self.num_outputs))((flatten_params(params) - statistics.mean) * scale)
