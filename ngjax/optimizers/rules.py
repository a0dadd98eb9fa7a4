"""Update rules: from the features of all scalars of a network to the direction and magnitude of their updates.

A rule is a Linen module. It reads one array of features per parameter tensor, in the order of the layers, and returns
one array of `(direction, magnitude)` for each. Its `reads` says which features these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.nn.linear import DeclareLinearMap, LinearMap
from ngjax.optimizers.features import NORMALIZED_FEATURES, SCALAR_FEATURES, FeatureSet
from ngjax.optimizers.heads import UpdateHead, in_chunks, map_scalars


class FFRule(nn.Module):
    """Every scalar for itself: the perceptron alone (`FF` of the paper, 5,250 meta-parameters; see also `celo2_rule`).

    Attributes:
      width: of the hidden layers.
      num_hidden: hidden layers.
      reads: the features.
      dtype: of the computation.
      chunk: scalars that the perceptron sees at a time.
    """

    width: int = 64
    num_hidden: int = 2
    reads: FeatureSet = SCALAR_FEATURES
    dtype: Any = jnp.float32
    chunk: int | None = None

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, "..."], ...]:
        """`[*shape, C]` to `[*shape, 2]` for every tensor."""
        head = UpdateHead(self.width, self.num_hidden, self.dtype, self.chunk, name="head")
        return tuple(head(f) for f in features)


def uniform_within(bound: float) -> nn.initializers.Initializer:
    """Uniform between `-bound` and `bound`."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class LSTMCell(NamedTuple):
    """Weights of an LSTM; gates stand in the order input, forget, candidate, output."""

    input_kernel: Float[Array, "in 4*h"]
    hidden_kernel: Float[Array, "h 4*h"]
    bias: Float[Array, " 4*h"]

    def astype(self, dtype: Any) -> LSTMCell:
        return LSTMCell(*(part.astype(dtype) for part in self))


def declare_lstm(module: nn.Module, inputs: int, width: int) -> LSTMCell:
    """Declares an LSTM among a module's parameters; all start uniform within `1 / sqrt(width)`, as in PyTorch."""
    init = uniform_within(1 / math.sqrt(width))
    return LSTMCell(
        module.param("input_kernel", init, (inputs, 4 * width), jnp.float32),
        module.param("hidden_kernel", init, (width, 4 * width), jnp.float32),
        module.param("bias", init, (4 * width,), jnp.float32),
    )


def lstm_step(
    gates: Float[Array, "*s gates"], memory: Float[Array, "*s h"]
) -> tuple[Float[Array, "*s h"], Float[Array, "*s h"]]:
    """Hidden state and memory after a step, from the memory before it and `4 h` gates before their nonlinearities."""
    into, forget, candidate, out = jnp.split(gates, 4, axis=-1)
    memory = nn.sigmoid(forget) * memory + nn.sigmoid(into) * jnp.tanh(candidate)
    return nn.sigmoid(out) * jnp.tanh(memory), memory


def lstm_over(cell: LSTMCell, inputs: Float[Array, "T in"]) -> Float[Array, "T h"]:
    """Hidden states after each of the inputs, from a state of zero."""
    zero = jnp.zeros(cell.hidden_kernel.shape[0], inputs.dtype)

    def step(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, memory = lstm_step(x + carry[0] @ cell.hidden_kernel, carry[1])
        return (hidden, memory), hidden

    return jax.lax.scan(step, (zero, zero), inputs @ cell.input_kernel + cell.bias)[1]


def declare_linear_map(name: str, inputs: int, outputs: int) -> LinearMap:
    """Declares a linear map; all of it starts uniform within `1 / sqrt(inputs)`, as in PyTorch."""
    init = uniform_within(1 / math.sqrt(inputs))
    return DeclareLinearMap(outputs, init, init, name=name)(inputs)


def tensor_summary(first: LinearMap, second: LinearMap, features: Float[Array, "*s 14"]) -> Float[Array, " h"]:
    """The mean over the scalars of a tensor of `second(relu(first(features)))`; of none, `second(0)`."""
    hidden = nn.relu(map_scalars(first, features)).astype(second.kernel.dtype)
    # The second map is linear, so the mean may come before it, which leaves one vector to map.
    scalars = tuple(range(hidden.ndim - 1))
    return map_scalars(second, jnp.sum(hidden, axis=scalars) / max(1, math.prod(hidden.shape[:-1])))


class LSTMRule(nn.Module):
    """An LSTM that runs over the tensors of the network within one step (`LSTM` of the paper).

    It reads a summary of each tensor, and its state after a tensor is given to all scalars of it. The state starts at
    zero in every step. (The paper's 11,554 meta-parameters count the bias of the cell twice.)

    Attributes:
      width: of the LSTM and of the hidden layers of the head.
      num_hidden: hidden layers of the head.
      dtype: of the computation on scalars; the recurrence is in float32.
      chunk: scalars that the perceptron sees at a time.
    """

    reads: ClassVar[FeatureSet] = SCALAR_FEATURES

    width: int = 32
    num_hidden: int = 1
    dtype: Any = jnp.float32
    chunk: int | None = None

    @nn.compact
    def __call__(self, features: Sequence[Float[Array, "..."]]) -> tuple[Float[Array, "..."], ...]:
        """`[*shape, 14]` to `[*shape, 2]` for every tensor, in the order of the recurrence."""
        first = declare_linear_map("summary_0", self.reads.size, self.width)
        second = declare_linear_map("summary_1", self.width, self.width)
        cell = declare_lstm(self, self.width, self.width)
        summaries = [tensor_summary(first.astype(self.dtype), second, f.astype(self.dtype)) for f in features]
        states = lstm_over(cell, jnp.stack(summaries))
        head = UpdateHead(self.width, self.num_hidden, self.dtype, self.chunk, name="head")
        return tuple(head(f, states[i]) for i, f in enumerate(features))


class CoordinatewiseLSTMRule(nn.Module):
    """An LSTM along the steps of the optimizer, one for every scalar (Andrychowicz et al. 2016, section 2.1).

    All share the same weights, and each has a state of its own, `2 * width` numbers that the optimizer keeps. Where
    meta-gradients are taken through single steps, this state counts as constant, as all that an optimizer reads:
    what a step writes for later ones is learned by `PES` alone.

    Attributes:
      width: of the LSTM and of the hidden layers of the head.
      num_hidden: hidden layers of the head.
      dtype: of the computation; the state is float32.
      chunk: scalars that LSTM and head see at a time.
    """

    reads: ClassVar[FeatureSet] = NORMALIZED_FEATURES

    width: int = 16
    num_hidden: int = 1
    dtype: Any = jnp.float32
    chunk: int | None = None

    @nn.compact
    def __call__(
        self, features: Sequence[Float[Array, "..."]], states: Sequence[Float[Array, "..."]]
    ) -> tuple[tuple[Float[Array, "..."], ...], tuple[Float[Array, "..."], ...]]:
        """`[*shape, 17]` and states `[*shape, 2 * width]` to `[*shape, 2]` and new states, for every tensor.

        A state is the hidden state and, behind it, the memory.
        """
        cell = declare_lstm(self, self.reads.size, self.width).astype(self.dtype)
        head = UpdateHead(self.width, self.num_hidden, self.dtype, self.chunk, name="head")

        def step(features: Array, state: Array) -> Array:
            hidden, memory = jnp.split(state, 2, axis=-1)
            gates = features.astype(self.dtype) @ cell.input_kernel + hidden.astype(self.dtype) @ cell.hidden_kernel
            return jnp.concatenate(lstm_step((gates + cell.bias).astype(jnp.float32), memory), axis=-1)

        pairs = zip(features, states, strict=True)
        states = [step(f, s) if self.chunk is None else in_chunks(step, self.chunk, f, s) for f, s in pairs]
        heads = tuple(head(f, s[..., : self.width]) for f, s in zip(features, states, strict=True))
        return heads, tuple(states)
