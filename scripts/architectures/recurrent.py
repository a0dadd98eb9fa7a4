"""Networks along time: recurrent cells, selective state spaces, dilated convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from .base import Architecture, Network, linen, normal
from .builders import equinox, flax_nnx, haiku, plain, tokens

# -- language models ---------------------------------------------------------------------------------------------------


class LSTMLanguageModel(nn.Module):
    vocabulary: int
    widths: Sequence[int]  # of the embedding and of the cells

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.widths[0], name="embedding")(ids)
        for i, width in enumerate(self.widths[1:]):
            x = nn.RNN(nn.OptimizedLSTMCell(width, name=f"cell_{i}"), name=f"layer_{i}")(x)
        return nn.Dense(self.vocabulary, name="head")(x)


def lstm(vocabulary: int, widths: Sequence[int], batch: int, length: int) -> Network:
    return linen(LSTMLanguageModel(vocabulary, widths), tokens(batch, length, vocabulary))


def gru(vocabulary: int, embedding: int, width: int, batch: int, length: int) -> Network:
    def logits(ids: jax.Array) -> jax.Array:
        cell = hk.GRU(width)
        x = hk.Embed(vocabulary, embedding)(ids)
        x, _ = hk.dynamic_unroll(cell, x, cell.initial_state(ids.shape[0]), time_major=False)
        return hk.Linear(vocabulary)(x)

    return haiku(logits, tokens(batch, length, vocabulary))


# -- cells in plain JAX and Equinox ------------------------------------------------------------------------------------


def elman(n_in: int, width: int, n_out: int, batch: int, length: int) -> Network:
    """A simple recurrent network of rectifiers that reads an image pixel by pixel."""
    shapes = {"input": (n_in, width), "recurrent": (width, width), "bias": (width,)}
    shapes |= {"head": (width, n_out), "head_bias": (n_out,)}

    def logits(params: Any, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jax.nn.relu(x @ params["input"] + h @ params["recurrent"] + params["bias"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], width)), x.swapaxes(0, 1))
        return h @ params["head"] + params["head_bias"]

    return plain(logits, shapes, normal(batch, length, n_in))


class MinGRU(eqx.Module):
    """Gates that see the input alone, so that all states come from one associative scan."""

    gate: eqx.nn.Linear
    candidate: eqx.nn.Linear

    def __init__(self, n_in: int, width: int, key: jax.Array):
        keys = jax.random.split(key)
        self.gate, self.candidate = (eqx.nn.Linear(n_in, width, key=k) for k in keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jax.nn.sigmoid(jax.vmap(self.gate)(x))
        new = gate * jax.vmap(self.candidate)(x)

        def compose(first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]) -> Any:
            return first[0] * then[0], then[0] * first[1] + then[1]

        return jax.lax.associative_scan(compose, (1 - gate, new))[1]


class MinGRUClassifier(eqx.Module):
    cells: list[MinGRU]
    head: eqx.nn.Linear

    def __init__(self, widths: Sequence[int], n_out: int, key: jax.Array):
        keys = jax.random.split(key, len(widths))
        self.cells = [MinGRU(a, b, k) for a, b, k in zip(widths[:-1], widths[1:], keys[1:], strict=True)]
        self.head = eqx.nn.Linear(widths[-1], n_out, key=keys[0])

    def __call__(self, x: jax.Array) -> jax.Array:
        for cell in self.cells:
            x = cell(x)
        return self.head(x[-1])


def min_gru(widths: Sequence[int], n_out: int, batch: int, length: int) -> Network:
    return equinox(lambda key: MinGRUClassifier(widths, n_out, key), normal(batch, length, widths[0]))


# -- selective state spaces --------------------------------------------------------------------------------------------


class MambaSizes(NamedTuple):
    vocabulary: int
    width: int
    inner: int
    states: int
    rank: int
    taps: int
    depth: int


def mamba_shapes(sizes: MambaSizes) -> Any:
    d, inner, states, rank = sizes.width, sizes.inner, sizes.states, sizes.rank
    block = {
        "norm": {"scale": (d,)},
        "in_proj": (d, 2 * inner),
        "conv": {"kernel": (sizes.taps, 1, inner), "bias": (inner,)},
        "x_proj": (inner, rank + 2 * states),
        "dt_proj": {"kernel": (rank, inner), "bias": (inner,)},
        "a_log": (inner, states),
        "d": (inner,),
        "out_proj": (inner, d),
    }
    return {"embedding": (sizes.vocabulary, d), "layers": [block] * sizes.depth, "norm": {"scale": (d,)}}


def rms_norm(params: Any, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * params["scale"]


def depthwise(params: Any, x: jax.Array) -> jax.Array:
    """Each channel convolved along its own past."""
    taps, _, channels = params["kernel"].shape
    x = jax.lax.conv_general_dilated(
        *(x, params["kernel"], (1,), [(taps - 1, 0)]),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=channels,
    )
    return x + params["bias"]


def selective_scan(delta: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, x: jax.Array) -> jax.Array:
    """`[batch, places, channels]` from states `[batch, channels, states]` whose dynamics depend on the input."""

    def step(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        delta, b, c, x = now
        state = state * jnp.exp(delta[..., None] * a) + (delta * x)[..., None] * b[:, None, :]
        return state, jnp.einsum("bdn,bn->bd", state, c)

    start = jnp.zeros((x.shape[0], *a.shape))
    return jax.lax.scan(step, start, tuple(part.swapaxes(0, 1) for part in (delta, b, c, x)))[1].swapaxes(0, 1)


def mamba_block(sizes: MambaSizes, params: Any, x: jax.Array) -> jax.Array:
    h, gate = jnp.split(rms_norm(params["norm"], x) @ params["in_proj"], 2, -1)
    h = jax.nn.silu(depthwise(params["conv"], h))
    low, b, c = jnp.split(h @ params["x_proj"], [sizes.rank, sizes.rank + sizes.states], -1)
    delta = jax.nn.softplus(low @ params["dt_proj"]["kernel"] + params["dt_proj"]["bias"])
    out = selective_scan(delta, -jnp.exp(params["a_log"]), b, c, h) + params["d"] * h
    return x + (out * jax.nn.silu(gate)) @ params["out_proj"]


def mamba(sizes: MambaSizes, batch: int, length: int) -> Network:
    def logits(params: Any, ids: jax.Array) -> jax.Array:
        x = params["embedding"][ids]
        for block in params["layers"]:
            x = mamba_block(sizes, block, x)
        return rms_norm(params["norm"], x) @ params["embedding"].T

    return plain(logits, mamba_shapes(sizes), tokens(batch, length, sizes.vocabulary))


# -- dilated convolutions ----------------------------------------------------------------------------------------------


class WaveNetSizes(NamedTuple):
    classes: int
    residual: int
    gated: int
    skip: int
    post: int
    dilations: tuple[int, ...]


class WaveNet(nnx.Module):
    def __init__(self, sizes: WaveNetSizes, rngs: nnx.Rngs):
        def conv(n_in: int, n_out: int, taps: int = 1, dilation: int = 1) -> nnx.Conv:
            return nnx.Conv(n_in, n_out, (taps,), kernel_dilation=dilation, padding="CAUSAL", rngs=rngs)

        residual, gated = sizes.residual, sizes.gated
        self.classes = sizes.classes
        self.first = conv(sizes.classes, residual, 2)
        self.filters = nnx.List([conv(residual, gated, 2, dilation) for dilation in sizes.dilations])
        self.gates = nnx.List([conv(residual, gated, 2, dilation) for dilation in sizes.dilations])
        self.residuals = nnx.List([conv(gated, residual) for _ in sizes.dilations[1:]])
        self.skips = nnx.List([conv(gated, sizes.skip) for _ in sizes.dilations])
        self.post, self.last = conv(sizes.skip, sizes.post), conv(sizes.post, sizes.classes)

    def __call__(self, samples: jax.Array) -> jax.Array:
        x = self.first(jax.nn.one_hot(samples, self.classes))
        total: Any = 0.0
        residuals = [*self.residuals, None]
        for filter_, gate, residual, skip in zip(self.filters, self.gates, residuals, self.skips, strict=True):
            h = jnp.tanh(filter_(x)) * nnx.sigmoid(gate(x))
            total = skip(h) + total
            x = x if residual is None else x + residual(h)  # what would follow the last layer is not used
        return self.last(nnx.relu(self.post(nnx.relu(total))))


def wavenet(sizes: WaveNetSizes, batch: int, length: int) -> Network:
    return flax_nnx(lambda rngs: WaveNet(sizes, rngs), tokens(batch, length, sizes.classes))


MAMBA = MambaSizes(vocabulary=50280, width=768, inner=1536, states=16, rank=48, taps=4, depth=24)
NARROW_MAMBA = MambaSizes(vocabulary=17, width=6, inner=10, states=4, rank=3, taps=3, depth=2)
WAVENET = WaveNetSizes(256, residual=64, gated=64, skip=256, post=256, dilations=tuple(2**i for i in range(10)) * 3)
NARROW_WAVENET = WaveNetSizes(9, residual=5, gated=6, skip=7, post=8, dilations=(1, 2, 1))

RECURRENT = (
    Architecture(
        "LSTM language model (medium, Zaremba et al.)",
        "Flax Linen",
        lambda: lstm(10000, (650, 650, 650), 1, 35),
        lambda: lstm(17, (5, 6, 7), 2, 4),
        ((5, 1), (6, 1), (7, 1)),
        (("params/embedding/embedding", 0, "gather"), ("params/head/kernel", 1, "output")),
    ),
    Architecture(
        "GRU language model",
        "Haiku",
        lambda: gru(66, 256, 1024, 1, 100),
        lambda: gru(17, 5, 7, 2, 4),
        ((5, 1), (7, 1)),
        (("embed/embeddings", 0, "gather"), ("linear/b", 0, "output")),
    ),
    Architecture(
        "Elman network (IRNN, pixel by pixel)",
        "plain JAX",
        lambda: elman(1, 100, 10, 1, 784),
        lambda: elman(2, 6, 3, 2, 5),
        ((6, 1),),
        (("input", 0, "input"), ("head", 1, "output")),
    ),
    Architecture(
        "minGRU (associative scan)",
        "Equinox",
        lambda: min_gru((1, 256, 256, 256), 10, 1, 784),
        lambda: min_gru((2, 6, 5), 3, 2, 7),
        ((5, 1), (6, 1)),
        (("cells/0/gate/weight", 1, "input"), ("head/weight", 0, "output")),
    ),
    Architecture(
        "Mamba-130M",
        "plain JAX",
        lambda: mamba(MAMBA, 1, 64),
        lambda: mamba(NARROW_MAMBA, 2, 5),
        # In each layer the rank of the step sizes, states, channels; and the stream.
        ((3, 1), (3, 1), (4, 1), (4, 1), (6, 1), (10, 1), (10, 1)),
        (("embedding", 0, "gather"), ("layers/0/conv/kernel", 0, "conv_general_dilated")),
    ),
    Architecture(
        "WaveNet",
        "Flax NNX",
        lambda: wavenet(WAVENET, 1, 4096),
        lambda: wavenet(NARROW_WAVENET, 2, 7),
        # The residual stream, three layers of gated units, the sum of all skips, the layer after it.
        ((5, 1), (6, 1), (6, 1), (6, 1), (7, 1), (8, 1)),
        (
            ("first/kernel", 1, "iota"),
            ("filters/0/kernel", 0, "conv_general_dilated"),
            ("last/kernel", 2, "output"),
        ),
    ),
)
