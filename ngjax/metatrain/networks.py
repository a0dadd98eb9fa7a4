"""The networks that learned optimizers train: convolutional ones, perceptrons, and transformers over characters.

Each is a frozen dataclass, which is hashable and so may be a static argument of `jax.jit`. Parameters are plain dicts
of float32 arrays, and start as PyTorch's layers do by default: weights and biases uniform in `±1/sqrt(fan_in)`,
embeddings standard normal, norms with scale 1 and bias 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from ngjax.chains import mlp_spec
from ngjax.infer import infer_spec
from ngjax.nn.activations import activation_function
from ngjax.spec import NeuralGraphSpec
from ngjax.trace import trace_spec

Params: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ConvNet:
    """Convolutions of 3 x 3 pixels with a ReLU after each, the mean over the image, and a dense layer.

    The first convolution takes every second pixel and pads nothing (28 pixels become 13, and 32 become 15), the others
    keep the size. Parameters: `{"conv_0": {"kernel": [3, 3, in, out], "bias": [out]}, "conv_1": ..., "dense_0":
    {"kernel": [in, classes], "bias": [classes]}}`.

    Attributes:
      channels: of the image, and of each convolution.
      classes: number of outputs.
    """

    channels: tuple[int, ...]
    classes: int = 10

    def init(self, key: PRNGKeyArray) -> Params:
        shapes = {f"conv_{i}": (3, 3, *ends) for i, ends in enumerate(itertools.pairwise(self.channels))}
        return _init_layers(key, shapes | {"dense_0": (self.channels[-1], self.classes)})

    def apply(self, params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        x = images.transpose(3, 1, 2, 0)
        for i in range(len(self.channels) - 1):
            x = jax.nn.relu(conv_3x3(params[f"conv_{i}"], x, stride=2 if i == 0 else 1, padding=0 if i == 0 else 1))
        return dense(params["dense_0"], x.mean((1, 2)).T)

    def spec(self) -> NeuralGraphSpec:
        # By names and shapes: the matrix products that `conv_3x3` is made of do not look like a convolution.
        return infer_spec(_abstract_params(self))


def conv_3x3(
    layer: Mapping[str, Array], x: Float[Array, "C H W B"], *, stride: int, padding: int
) -> Float[Array, "D h w B"]:
    """A convolution as a matrix product with the patches of the images.

    XLA's convolutions on CPU are slow, above all the gradients, and more so under `vmap` over kernels. With the images
    along the last axis, a patch is copied in runs that are long and contiguous.
    """
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((size - 3) // stride + 1 for size in x.shape[1:3])
    patches = [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    kernel = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
    out = kernel.T @ jnp.concatenate(patches).reshape(len(kernel), -1)
    return out.reshape(-1, height, width, x.shape[-1]) + layer["bias"][:, None, None, None]


@dataclasses.dataclass(frozen=True)
class MLP:
    """Dense layers, with an activation behind all but the last: parameters as in `ngjax.mlp_spec`.

    Attributes:
      sizes: numbers of inputs, of the neurons of each hidden layer, and of outputs.
      activation: of the hidden layers, an elementwise one of `ngjax.spec.ACTIVATIONS`.
    """

    sizes: tuple[int, ...]
    activation: str

    def __post_init__(self) -> None:
        activation_function(self.activation)  # an unknown one is refused here

    def init(self, key: PRNGKeyArray) -> Params:
        return _init_layers(key, {f"layer_{i}": ends for i, ends in enumerate(itertools.pairwise(self.sizes))})

    def apply(self, params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        activate = activation_function(self.activation)
        x = images.reshape(len(images), -1)
        last = len(self.sizes) - 2
        for i in range(last):
            x = activate(dense(params[f"layer_{i}"], x))
        return dense(params[f"layer_{last}"], x)

    def spec(self) -> NeuralGraphSpec:
        return mlp_spec(self.sizes, activation=self.activation)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A causal transformer that predicts the next token, with norms in front of each branch and learned positions.

    Parameters: `token` `[V, D]`, `position` `[T, D]`; in each block `norm_0`, `query`, `key`, `value` with kernels
    `[D, heads, D / heads]`, `out` with a kernel `[heads, D / heads, D]`, `norm_1`, `up` `[D, 4 D]` and `down`
    `[4 D, D]`; then `norm` and `head` `[D, V]`, which is not tied to the embedding.

    Attributes:
      vocabulary: number of tokens, V.
      context: tokens that are read at most, T.
      width: of the residual stream, D.
      heads: of the attention; they divide the width.
      layers: number of blocks.
    """

    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int

    def init(self, key: PRNGKeyArray) -> Params:
        embedding_key, head_key, *block_keys = jax.random.split(key, 2 + self.layers)
        embeddings = jax.random.normal(embedding_key, (self.vocabulary + self.context, self.width))
        return {
            "token": embeddings[: self.vocabulary],
            "position": embeddings[self.vocabulary :],
            "norm": self._init_norm(),
            **_init_layers(head_key, {"head": (self.width, self.vocabulary)}),
            **{f"block_{i}": self._init_block(block_key) for i, block_key in enumerate(block_keys)},
        }

    def _init_block(self, key: PRNGKeyArray) -> Params:
        width, split = self.width, (self.heads, self.width // self.heads)
        square = dict.fromkeys(("query", "key", "value", "out"), (width, width))
        layers = _init_layers(key, {**square, "up": (width, 4 * width), "down": (4 * width, width)})
        for name in ("query", "key", "value"):
            layers[name] = {"kernel": layers[name]["kernel"].reshape(width, *split)}
        layers["out"]["kernel"] = layers["out"]["kernel"].reshape(*split, width)
        return {**layers, "norm_0": self._init_norm(), "norm_1": self._init_norm()}

    def _init_norm(self) -> Params:
        return {"scale": jnp.ones(self.width), "bias": jnp.zeros(self.width)}

    def apply(self, params: Params, tokens: Integer[Array, "B T"]) -> Float[Array, "B T V"]:
        x = params["token"][tokens.astype(jnp.int32)] + params["position"][: tokens.shape[1]]
        for i in range(self.layers):
            block = params[f"block_{i}"]
            x = x + attention(block, layer_norm(block["norm_0"], x))
            x = x + dense(block["down"], jax.nn.relu(dense(block["up"], layer_norm(block["norm_1"], x))))
        return dense(params["head"], layer_norm(params["norm"], x))

    def spec(self) -> NeuralGraphSpec:
        tokens = jax.ShapeDtypeStruct((1, self.context), jnp.int32)
        return trace_spec(self.apply, _abstract_params(self), tokens)


def attention(block: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Causal attention of several heads."""
    query, key, value = (jnp.einsum("btd,dhk->bhtk", x, block[n]["kernel"]) for n in ("query", "key", "value"))
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key) / math.sqrt(query.shape[-1])
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    mixed = jnp.einsum("bhts,bhsk->bthk", weights, value)
    return jnp.einsum("bthk,hkd->btd", mixed, block["out"]["kernel"]) + block["out"]["bias"]


def layer_norm(norm: Mapping[str, Array], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Zero mean and unit variance along the last axis, then a scale and a bias for each feature."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def dense(layer: Mapping[str, Array], x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
    """`x W + b`."""
    return x @ layer["kernel"] + layer["bias"]


def _init_layers(key: PRNGKeyArray, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Kernels of these shapes, `[..., in, out]`, and biases, as PyTorch draws them."""
    # One draw for all: each takes its time to compile.
    draw = jax.random.uniform(key, (sum(math.prod(s) + s[-1] for s in shapes.values()),), minval=-1.0, maxval=1.0)
    params, start = {}, 0
    for name, shape in shapes.items():
        middle = start + math.prod(shape)
        end = middle + shape[-1]
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        params[name] = {"kernel": bound * draw[start:middle].reshape(shape), "bias": bound * draw[middle:end]}
        start = end
    return params


Network: TypeAlias = ConvNet | MLP | Transformer


def _abstract_params(network: Network) -> Params:
    return jax.eval_shape(network.init, jax.random.key(0))


# -- in chunks ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mean_over_chunks(
    function: Callable[[PyTree, PyTree], Float[Array, ""]], size: int, params: PyTree, batch: PyTree
) -> Float[Array, ""]:
    """The mean of `function(params, chunk)` over chunks of a batch, one after the other; each takes its own gradient.

    What a chunk needs for its gradient then stays in the cache of a core. It can be differentiated with respect to the
    parameters alone, in reverse mode first (`jax.grad`, not `jax.jvp`); gradients can be differentiated further.

    Args:
      function: a mean over the examples of a chunk.
      size: examples in a chunk at most. All chunks are equal: it is the largest divisor of the batch's size up to this.
      params: what gradients are taken with respect to.
      batch: arrays with the examples along their first axis.
    """
    return jax.lax.map(lambda chunk: function(params, chunk), _chunks(size, batch)).mean()


def _mean_forward(
    function: Callable[[PyTree, PyTree], Float[Array, ""]], size: int, params: PyTree, batch: PyTree
) -> tuple[Float[Array, ""], PyTree]:
    chunks = _chunks(size, batch)
    share = 1 / len(jax.tree.leaves(chunks)[0])

    def add(total: PyTree, chunk: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(lambda a, b: a + share * b, total, jax.value_and_grad(function)(params, chunk)), None

    start = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    return jax.lax.scan(add, start, chunks)[0]


def _mean_backward(function: Any, size: int, gradient: PyTree, cotangent: Array) -> tuple[PyTree, None]:
    return jax.tree.map(lambda leaf: cotangent * leaf, gradient), None


mean_over_chunks.defvjp(_mean_forward, _mean_backward)


def _chunks(size: int, batch: PyTree) -> PyTree:
    rows = len(jax.tree.leaves(batch)[0])
    size = max(n for n in range(1, min(size, rows) + 1) if rows % n == 0)
    return jax.tree.map(lambda leaf: leaf.reshape(rows // size, size, *leaf.shape[1:]), batch)
