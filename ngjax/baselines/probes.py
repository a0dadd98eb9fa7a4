"""Learned probes: classify a network by what it answers, without looking at its weights.

The probe inputs are trained through the networks they are put into. Kahana et al., "Deep Linear Probe Generators for
Weight Space Learning" (arXiv 2410.10811), compare with it as vanilla probing and find it strong; the probe features of
Kofinas et al. 2024 (arXiv 2403.12143) put the activations of all neurons at learned inputs into the neural graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.baselines.mlp import MLP


class ProbeReadout(nn.Module):
    """The outputs of a network at learned inputs, then an MLP.

    Attributes:
      apply_fn: `(params, inputs [P, in]) -> outputs [P, out]` of one network.
      num_inputs: input size of the networks.
      num_probes: how many inputs are learned.
      num_outputs: logits per network.
      hidden: widths of the relu layers.
    """

    apply_fn: Callable[[Any, Array], Array]
    num_inputs: int
    num_outputs: int
    num_probes: int = 64
    hidden: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, params: Any) -> Float[Array, "B {self.num_outputs}"]:
        """Logits of networks.

        Args:
          params: pytree of leaves `[B, ...]`.
        """
        probes = self.param("probes", _uniform, (self.num_probes, self.num_inputs))
        answers = jax.vmap(self.apply_fn, in_axes=(0, None))(params, probes)
        return MLP((*self.hidden, self.num_outputs))(answers.reshape(len(answers), -1))


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """In [-1, 1], the range of image coordinates."""
    return jax.random.uniform(key, shape, jnp.float32, minval=-1, maxval=1)
