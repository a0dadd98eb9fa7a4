"""Networks of sets, graphs, functions and pixels: perceptrons, residual networks, message passing, autoencoders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from .base import Architecture, Network, linen, normal
from .builders import equinox, haiku, plain

# -- perceptrons and pixels --------------------------------------------------------------------------------------------


class Perceptron(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, sizes: Sequence[int], key: jax.Array):
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = [eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def perceptron(sizes: Sequence[int], batch: int) -> Network:
    return equinox(lambda key: Perceptron(sizes, key), normal(batch, sizes[0]))


def haiku_resnet(channels: Sequence[int], blocks: Sequence[int], classes: int, batch: int, size: int) -> Network:
    """Weights and running statistics; those of an average that evaluation does not read have no use there."""

    def logits(images: jax.Array, is_training: bool) -> jax.Array:
        return hk.nets.ResNet(
            blocks,
            classes,
            bottleneck=False,
            channels_per_group=channels,
            use_projection=(False, True, True, True),
            initial_conv_config={"output_channels": channels[0]},
            logits_config={"w_init": hk.initializers.RandomNormal(0.01)},
        )(images, is_training)

    model: Any = hk.without_apply_rng(hk.transform_with_state(logits))
    images = normal(batch, size, size, 3)

    def init(key: jax.Array) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # Haiku's averages count in integers
            return model.init(key, images, True)

    return Network(lambda variables, images: model.apply(*variables, images, False)[0], init, (images,))


class VAE(nn.Module):
    """Evaluated at the mean of the latent variables; they leave only in the divergence, which has no order."""

    pixels: int
    hidden: int
    latent: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = nn.relu(nn.Dense(self.hidden, name="encoder")(x))
        mean, log_variance = nn.Dense(self.latent, name="mean")(h), nn.Dense(self.latent, name="log_variance")(h)
        divergence = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, -1)
        h = nn.relu(nn.Dense(self.hidden, name="decoder")(mean))
        return nn.sigmoid(nn.Dense(self.pixels, name="pixels")(h)), divergence


def vae(pixels: int, hidden: int, latent: int, batch: int) -> Network:
    return linen(VAE(pixels, hidden, latent), normal(batch, pixels))


# -- sets and graphs ---------------------------------------------------------------------------------------------------


class SetBlock(eqx.Module):
    """Elements of one set attend to those of another."""

    attention: eqx.nn.MultiheadAttention
    norm_1: eqx.nn.LayerNorm
    hidden: eqx.nn.Linear
    norm_2: eqx.nn.LayerNorm

    def __init__(self, width: int, heads: int, key: jax.Array):
        keys = jax.random.split(key)
        biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
        self.attention = eqx.nn.MultiheadAttention(heads, width, **biases, key=keys[0])
        self.hidden = eqx.nn.Linear(width, width, key=keys[1])
        self.norm_1, self.norm_2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        x = jax.vmap(self.norm_1)(x + self.attention(x, y, y))
        return jax.vmap(self.norm_2)(x + jax.nn.relu(jax.vmap(self.hidden)(x)))


class InducedBlock(eqx.Module):
    """A set attends to itself by way of a few learned points."""

    points: jax.Array
    inwards: SetBlock
    outwards: SetBlock

    def __init__(self, count: int, width: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.points = jax.random.normal(keys[0], (count, width)) * width**-0.5
        self.inwards, self.outwards = SetBlock(width, heads, keys[1]), SetBlock(width, heads, keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outwards(x, self.inwards(self.points, x))


class SetTransformer(eqx.Module):
    embedding: eqx.nn.Linear
    blocks: list[InducedBlock]
    elementwise: eqx.nn.Linear
    seed: jax.Array
    pooling: SetBlock
    head: eqx.nn.Linear

    def __init__(self, n_in: int, width: int, heads: int, points: int, n_out: int, key: jax.Array):
        keys = jax.random.split(key, 7)
        self.embedding = eqx.nn.Linear(n_in, width, key=keys[0])
        self.blocks = [InducedBlock(points, width, heads, key) for key in keys[1:3]]
        self.elementwise = eqx.nn.Linear(width, width, key=keys[3])
        self.seed = jax.random.normal(keys[4], (1, width)) * width**-0.5
        self.pooling = SetBlock(width, heads, keys[5])
        self.head = eqx.nn.Linear(width, n_out, key=keys[6])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(x)
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu(jax.vmap(self.elementwise)(x))
        return self.head(self.pooling(self.seed, x)[0])


def set_transformer(width: int, heads: int, points: int, n_out: int, batch: int, count: int) -> Network:
    return equinox(lambda key: SetTransformer(3, width, heads, points, n_out, key), normal(batch, count, 3))


def graph_of(num_nodes: int, num_edges: int, node_features: int, edge_features: int) -> jraph.GraphsTuple:
    order = np.arange(num_edges)
    return jraph.GraphsTuple(
        nodes=normal(num_nodes, node_features),
        edges=normal(num_edges, edge_features) if edge_features else None,
        senders=jnp.asarray(7 * order % num_nodes, jnp.int32),
        receivers=jnp.asarray((3 * order + 1) % num_nodes, jnp.int32),
        n_node=jnp.asarray([num_nodes]),
        n_edge=jnp.asarray([num_edges]),
        globals=None,
    )


def simulator(latent: int, hidden: int, steps: int, graph: jraph.GraphsTuple, n_out: int) -> Network:
    """Learns to move particles: message passing with residual connections of nodes and edges."""

    def mlp(name: str, n_out: int, norm: bool = True) -> Callable[[jax.Array], jax.Array]:
        layers: list[Any] = [hk.nets.MLP((hidden, hidden, n_out), name=name)]
        if norm:
            layers.append(hk.LayerNorm(-1, create_scale=True, create_offset=True, name=f"{name}_norm"))
        return hk.Sequential(layers)

    def update(step: int) -> jraph.GraphNetwork:
        edges, nodes = mlp(f"edges_{step}", latent), mlp(f"nodes_{step}", latent)
        return jraph.InteractionNetwork(
            lambda e, sent, received: edges(jnp.concatenate([e, sent, received], -1)),
            lambda n, received: nodes(jnp.concatenate([n, received], -1)),
        )

    def accelerations(graph: jraph.GraphsTuple) -> jax.Array:
        graph = graph._replace(nodes=mlp("nodes_in", latent)(graph.nodes), edges=mlp("edges_in", latent)(graph.edges))
        for step in range(steps):
            new = update(step)(graph)
            graph = new._replace(nodes=graph.nodes + new.nodes, edges=graph.edges + new.edges)
        return mlp("out", n_out, norm=False)(graph.nodes)

    return haiku(accelerations, graph)


def graph_convolutions(n_in: int, hidden: int, n_out: int, num_nodes: int, num_edges: int) -> Network:
    """Every node takes the mean of its neighbours and of itself."""

    def logits(graph: jraph.GraphsTuple) -> jax.Array:
        ones = jnp.ones((num_edges,))
        scale = jax.lax.rsqrt(1 + jax.ops.segment_sum(ones, graph.receivers, num_nodes))[:, None]

        def mixed(x: jax.Array) -> jax.Array:
            x = x * scale
            return scale * (x + jax.ops.segment_sum(x[graph.senders], graph.receivers, num_nodes))

        x = jax.nn.relu(mixed(hk.Linear(hidden, name="first")(graph.nodes)))
        return mixed(hk.Linear(n_out, name="second")(x))

    return haiku(logits, graph_of(num_nodes, num_edges, n_in, 0))


# -- functions ---------------------------------------------------------------------------------------------------------


def deep_onet(branch: Sequence[int], trunk: Sequence[int], batch: int, places: int) -> Network:
    """An operator: the function `u`, seen by some sensors, becomes another one, evaluated at any place."""

    def linear(n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (n_in, n_out), "bias": (n_out,)}

    def chain(sizes: Sequence[int]) -> list[dict[str, tuple[int, ...]]]:
        return [linear(*pair) for pair in itertools.pairwise(sizes)]

    def run(layers: Any, x: jax.Array, last: Callable[[jax.Array], jax.Array]) -> jax.Array:
        for i, layer in enumerate(layers):
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.relu(x) if i + 1 < len(layers) else last(x)
        return x

    def apply(params: Any, u: jax.Array, x: jax.Array) -> jax.Array:
        coefficients = run(params["branch"], u, lambda x: x)
        basis = run(params["trunk"], x, jax.nn.relu)
        return jnp.einsum("bp,np->bn", coefficients, basis) + params["bias"]

    shapes = {"branch": chain(branch), "trunk": chain(trunk), "bias": ()}
    return plain(apply, shapes, normal(batch, branch[0]), normal(places, trunk[0]))


def hypernetwork(latent: int, hyper: int, width: int, n_out: int, batch: int, places: int) -> Network:
    """One network makes all weights of another, which maps places of the plane to colours."""
    parts = {"w1": (2, width), "b1": (width,), "w2": (width, n_out), "b2": (n_out,)}
    sizes = [int(np.prod(shape)) for shape in parts.values()]
    shapes = {"in": (latent, hyper), "in_bias": (hyper,), "out": (hyper, sum(sizes)), "out_bias": (sum(sizes),)}

    def generated(params: Any, z: jax.Array) -> dict[str, jax.Array]:
        flat = jax.nn.relu(z @ params["in"] + params["in_bias"]) @ params["out"] + params["out_bias"]
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1].tolist(), -1)
        return {name: piece.reshape(-1, *shape) for (name, shape), piece in zip(parts.items(), pieces, strict=True)}

    def colours(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
        made = generated(params, z)
        h = jnp.tanh(jnp.einsum("nc,bch->bnh", x, made["w1"]) + made["b1"][:, None])
        return jnp.einsum("bnh,bho->bno", h, made["w2"]) + made["b2"][:, None]

    return plain(colours, shapes, normal(batch, latent), normal(places, 2))


def kolmogorov_arnold(sizes: Sequence[int], count: int, batch: int) -> Network:
    """A learned function on every edge: a sum of radial functions, which stand on a grid, and a weighted SiLU."""
    grid = np.linspace(-1.0, 1.0, count, dtype=np.float32)
    shapes = [
        {"base": (n_in, n_out), "coefficients": (n_in, count, n_out)} for n_in, n_out in itertools.pairwise(sizes)
    ]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params:
            bases = jnp.exp(-(((x[..., None] - grid) * (count - 1) / 2) ** 2))
            x = jax.nn.silu(x) @ layer["base"] + jnp.einsum("big,igo->bo", bases, layer["coefficients"])
        return x

    return plain(apply, shapes, normal(batch, sizes[0]))


def _set_transformer_free() -> tuple[tuple[int, int], ...]:
    attention = [(2, 1), (3, 2), (3, 2)]  # heads, dimensions of queries and keys in each, of values
    induced = [(4, 1), (6, 1), *attention * 2]  # points, their stream
    # Both blocks, the stream of the set, the layer after it, the stream of the seed and its attention.
    return tuple(sorted([*induced * 2, (6, 1), (6, 1), (6, 1), *attention]))


GRAPHS_AND_SETS = (
    Architecture(
        "LeNet-300-100",
        "Equinox",
        lambda: perceptron((784, 300, 100, 10), 1),
        lambda: perceptron((7, 5, 4, 3), 2),
        ((4, 1), (5, 1)),
        (("layers/0/weight", 1, "input"), ("layers/2/bias", 0, "output")),
    ),
    Architecture(
        "ResNet-18 (hk.nets)",
        "Haiku",
        lambda: haiku_resnet((64, 128, 256, 512), (2, 2, 2, 2), 1000, 1, 224),
        lambda: haiku_resnet((4, 5, 6, 7), (1, 1, 1, 1), 3, 2, 32),
        # In each group the stream and the neurons inside the block.
        ((4, 1), (4, 1), (5, 1), (5, 1), (6, 1), (6, 1), (7, 1), (7, 1)),
        (
            ("0/res_net/~/initial_conv/w", 2, "input"),
            ("0/res_net/~/initial_conv/w", 0, "conv_general_dilated"),
            ("1/res_net/~/initial_batchnorm/~/mean_ema/hidden", 3, "used by no equation"),
        ),
        loose=2 * (3 * 4 + 3 * (5 + 6 + 7)),  # the averages that only training reads, of each normalized channel
    ),
    Architecture(
        "variational autoencoder",
        "Flax Linen",
        lambda: vae(784, 400, 20, 1),
        lambda: vae(9, 6, 3, 2),
        ((3, 1), (6, 1), (6, 1)),
        (("params/encoder/kernel", 0, "input"), ("params/pixels/kernel", 1, "output")),
    ),
    Architecture(
        "Set Transformer",
        "Equinox",
        lambda: set_transformer(256, 4, 16, 40, 1, 1000),
        lambda: set_transformer(6, 2, 4, 3, 2, 5),
        _set_transformer_free(),
        (("embedding/weight", 1, "input"), ("head/weight", 0, "output")),
        # Learned points that are projected, normalized and added to before they meet the inputs have no place in the
        # graph, and what they alone share with others is pinned.
        loose=108,
        missed=(*[(2, 1)] * 3, *[(3, 2)] * 3, *[(6, 1)] * 3),
    ),
    Architecture(
        "graph network simulator",
        "Haiku",
        lambda: simulator(128, 128, 10, graph_of(500, 3000, 30, 3), 2),
        lambda: simulator(6, 7, 2, graph_of(4, 9, 3, 2), 2),
        # The streams of nodes and of edges, the last messages, which join no stream, two hidden layers of seven MLPs.
        ((6, 1), (6, 1), (6, 1), *[(7, 1)] * 14),
        (("nodes_in/~/linear_0/w", 0, "input"), ("out/~/linear_2/w", 1, "output")),
    ),
    Architecture(
        "graph convolutional network",
        "Haiku",
        lambda: graph_convolutions(1433, 16, 7, 2708, 10556),
        lambda: graph_convolutions(5, 6, 3, 4, 9),
        ((6, 1),),
        (("first/w", 0, "input"), ("second/b", 0, "output")),
    ),
    Architecture(
        "DeepONet",
        "plain JAX",
        lambda: deep_onet((100, 40, 40), (1, 40, 40), 1, 100),
        lambda: deep_onet((5, 7, 4), (2, 6, 4), 2, 3),
        ((4, 1), (6, 1), (7, 1)),
        (("branch/0/kernel", 0, "input"), ("trunk/0/kernel", 0, "input")),
        loose=1,  # the bias of a scalar product of two networks, which is no neuron's
    ),
    Architecture(
        "hypernetwork of an image",
        "plain JAX",
        lambda: hypernetwork(256, 256, 256, 3, 1, 1024),
        lambda: hypernetwork(5, 6, 4, 3, 2, 7),
        ((4, 1), (6, 1)),  # neurons of the network that is made, and of the one that makes it
        (("in", 0, "input"), ("out", 1, "output")),
    ),
    Architecture(
        "Kolmogorov-Arnold network",
        "plain JAX",
        lambda: kolmogorov_arnold((2, 5, 1), 8, 1),
        lambda: kolmogorov_arnold((3, 5, 4, 2), 6, 2),
        ((4, 1), (5, 1)),
        (("0/coefficients", 0, "input"), ("1/coefficients", 1, "constant")),
    ),
)
