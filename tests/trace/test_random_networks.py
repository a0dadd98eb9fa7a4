"""Networks put together at random from the blocks that `trace_spec` knows: symmetry, exact return, invariant models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ngjax
from tests.trace.test_networks import free_groups

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "sine": jnp.sin}


class Weights:
    """Parameters by name: made when they are first asked for, and read the next time."""

    def __init__(self, params=None):
        self.reading, self.params, self.count = params is not None, params or {}, 0
        self.rng = np.random.default_rng(0)

    def __call__(self, *shape, positive=False):
        name = f"w{self.count:03d}"
        self.count += 1
        if not self.reading:
            values = self.rng.normal(size=shape) / math.sqrt(max(1, math.prod(shape[:-1])))
            self.params[name] = (np.abs(values) + 0.5 if positive else values + 0.1).astype(np.float32)
        return self.params[name]


def dense(w, x, width):
    return x @ w(x.shape[-1], width) + w(width)


def standardized(x, axes):
    return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-3)


# Blocks of any array whose last axis holds the neurons, `[..., width]`.


def layer(w, x, width, f):
    return f(dense(w, x, width))


def residual(w, x, width, f):
    return x + dense(w, f(dense(w, x, width)), x.shape[-1])


def gated(w, x, width, f):
    return f(dense(w, x, width)) * dense(w, x, width)


def layer_norm(w, x, width, f):
    return f(standardized(x, -1) * w(x.shape[-1]) + w(x.shape[-1]))


def rms_norm(w, x, width, f):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * w(x.shape[-1])


def batch_norm(w, x, width, f):
    n = x.shape[-1]
    return f((x - w(n)) * jax.lax.rsqrt(w(n, positive=True) + 1e-3) * w(n) + w(n))


def group_norm(w, x, width, f):
    groups = 2 if x.shape[-1] % 2 == 0 else 1
    blocks = x.reshape(*x.shape[:-1], groups, -1)
    return f(standardized(blocks, -1).reshape(x.shape) * w(x.shape[-1]))


def concatenated(w, x, width, f):
    return jnp.concatenate([x, f(dense(w, x, width))], -1)


def halves(w, x, width, f):
    a, b = jnp.split(dense(w, x, 2 * width), 2, -1)
    return a * jax.nn.sigmoid(b)


def partial_residual(w, x, width, f):
    """Added to as many neurons as there are."""
    n = min(width, x.shape[-1])
    return f(dense(w, x, width)).at[..., :n].add(x[..., :n])


def padded_residual(w, x, width, f):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width)]) + dense(w, x, x.shape[-1] + width)


def low_rank(w, x, width, f):
    return f(x @ (w(x.shape[-1], width) + w(x.shape[-1], 2) @ w(2, width)))


def scanned(w, x, width, f):
    kernels, biases = w(3, x.shape[-1], x.shape[-1]), w(3, x.shape[-1])
    return jax.lax.scan(lambda h, p: (h + f(h @ p[0] + p[1]), None), x, (kernels, biases))[0]


def experts(w, x, width, f):
    gates = jax.nn.softmax(dense(w, x, 3))
    hidden = f(jnp.einsum("...n,enm->...em", x, w(3, x.shape[-1], width)))
    return jnp.einsum("...em,emo,...e->...o", hidden, w(3, width, 4), gates)


def reused(w, x, width, f):
    """One matrix down and up."""
    kernel = w(x.shape[-1], width)
    return x + f(x @ kernel) @ kernel.T


ANY = [
    *(layer, residual, gated, layer_norm, rms_norm, batch_norm, group_norm, concatenated, halves),
    *(partial_residual, padded_residual, low_rank, scanned, experts, reused),
]

# Blocks of tokens `[batch, time, width]`.


def attention(w, x, width, f):
    heads, dim = 2, 3
    qkv = dense(w, standardized(x, -1) * w(x.shape[-1]), 3 * heads * dim)
    q, k, v = (part.reshape(*x.shape[:2], heads, dim) for part in jnp.split(qkv, 3, -1))
    scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*x.shape[:2], -1)
    return x + dense(w, mixed, x.shape[-1])


def fused_attention(w, x, width, f):
    heads, dim = 2, 3
    qkv = dense(w, x, 3 * heads * dim).reshape(*x.shape[:2], 3, heads, dim)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return x + dense(w, jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1), x.shape[-1])


def token_mixing(w, x, width, f):
    mixed = dense(w, f(dense(w, x.swapaxes(1, 2), width)), x.shape[1])
    return x + mixed.swapaxes(1, 2)


def positions(w, x, width, f):
    return x + w(x.shape[1] + 1, x.shape[-1])[: x.shape[1]]


def lstm(w, x, width, f):
    kernel, recurrent, bias = w(x.shape[-1], 4 * width), w(width, 4 * width), w(4 * width)

    def step(state, token):
        c, h = state
        i, g, forget, o = jnp.split(token @ kernel + h @ recurrent + bias, 4, -1)
        c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    start = jnp.zeros((x.shape[0], width))
    return jax.lax.scan(step, (start, start), x.swapaxes(0, 1))[1].swapaxes(0, 1)


# Blocks of images `[batch, height, width, channels]`.


def convolution(w, x, kernel, *, stride=1, dilation=1, groups=1):
    return jax.lax.conv_general_dilated(
        *(x, kernel, (stride, stride), "SAME"),
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def conv(w, x, width, f, **kwargs):
    return f(convolution(w, x, w(3, 3, x.shape[-1], width), **kwargs) + w(width))


def depthwise(w, x, width, f):
    n = x.shape[-1]
    return f(convolution(w, x, w(3, 3, 1, n), groups=n) + w(n))


def grouped(w, x, width, f):
    return f(convolution(w, layer(w, x, 4, f), w(3, 3, 2, 6), groups=2))


def pooled(w, x, width, f):
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "SAME")


def squeeze_excite(w, x, width, f):
    gate = jax.nn.sigmoid(dense(w, f(dense(w, x.mean((1, 2)), width)), x.shape[-1]))
    return x * gate[:, None, None]


def instance_norm(w, x, width, f):
    return f(standardized(x, (1, 2)) * w(x.shape[-1]) + w(x.shape[-1]))


TOKENS = [*ANY, attention, fused_attention, token_mixing, positions, lstm]
IMAGES = [
    *ANY,
    *(conv, depthwise, grouped, pooled, squeeze_excite, instance_norm),
    *(functools.partial(conv, stride=2), functools.partial(conv, dilation=2)),
]

# -- what they are put into -------------------------------------------------------------------------------------------


def vectors(w, x, blocks):
    x = jnp.tanh(dense(w, x, 5))
    for block, width, f in blocks:
        x = block(w, x, width, f)
    return dense(w, x, 2)


def sequences(w, x, blocks):
    x = jnp.asarray(w(7, 4))[x]
    for block, width, f in blocks:
        x = block(w, x, width, f)
    return dense(w, x.mean(1), 2)


def pictures(w, x, blocks):
    x = conv(w, x, 4, jax.nn.relu)
    for block, width, f in blocks:
        x = block(w, x, width, f)
    return dense(w, x.reshape(x.shape[0], -1), 2)


rng = np.random.default_rng(1)
KINDS = {
    "vectors": (vectors, ANY, rng.normal(size=(3, 4)).astype(np.float32)),
    "sequences": (sequences, TOKENS, rng.integers(0, 7, (2, 5))),
    "pictures": (pictures, IMAGES, rng.normal(size=(2, 4, 4, 2)).astype(np.float32)),
}


def blocks_of(kind):
    _, blocks, _ = KINDS[kind]
    block = st.tuples(st.sampled_from(blocks), st.sampled_from([2, 4]), st.sampled_from(list(ACTIVATIONS.values())))
    return st.lists(block, min_size=1, max_size=4)


def built(kind, blocks):
    """The function of a random network, its parameters and its input."""
    network, _, x = KINDS[kind]
    weights = Weights()
    jax.eval_shape(lambda x: network(weights, x, blocks), x)
    return lambda params, x: network(Weights(params), x, blocks), weights.params, x


@functools.cache
def models():
    """Both models over an edge list, each compiled once: all batches have the sizes of one budget and kernel grid."""
    encoder = ngjax.EncoderConfig(max_inputs=64, max_hidden_layers=64, max_outputs=8)
    backbones = (
        ngjax.NGGNN(features=8, num_layers=2, encoder=encoder),
        ngjax.NGT(node_features=8, edge_features=4, attention_features=8, num_layers=1, num_heads=2, encoder=encoder),
    )
    found = []
    for backbone in backbones:
        model = ngjax.WeightSpaceModel(backbone, ngjax.GraphReadout(features=3, pooling="mean"))
        found.append((jax.jit(model.init), jax.jit(model.apply), {}))
    return found


BUDGET = ngjax.GraphBudget(graphs=4, nodes=640, edges=8192, nodes_per_graph=256)


@functools.cache
def anchor():
    """A network with the largest kernels of all, which keeps the batches' kernel grid the same, and loose scalars."""
    shapes = {"a": (2, 3, 16), "b": (3, 2, 5, 5), "c": ()}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}

    def network(p, x):
        hidden = jnp.einsum("bik,ijk->bj", x, p["a"])
        return jnp.einsum("bj,jokl->bokl", hidden, p["b"]).sum((2, 3)) / p["c"]

    return ngjax.trace_spec(network, params, np.ones((1, 2, 16), np.float32)), params


@functools.partial(jax.jit, static_argnums=0)
def prepared(spec, params):
    """The network with its neurons in another order, itself back from its graph, and a batch of both and another."""
    moved = ngjax.permute_params(spec, ngjax.random_permutations(jax.random.key(0), spec), params)
    again = ngjax.to_params(spec, ngjax.to_groups(spec, params))
    if spec.num_nodes > 250 or spec.num_edges > 3500:
        return moved, again, None
    networks = [(spec, params), anchor(), (spec, moved)]
    return moved, again, ngjax.batch_graphs([ngjax.to_graph(*network) for network in networks], BUDGET)


@pytest.mark.parametrize("kind", KINDS)
def test_random_networks(kind):
    @settings(max_examples=4, phases=[Phase.generate])  # shrinking would take minutes
    @given(blocks_of(kind))
    def check(blocks):
        network, params, x = built(kind, blocks)
        spec = ngjax.trace_spec(network, params, x)
        assert free_groups(spec)
        moved, again, batch = prepared(spec, params)
        jax.tree.map(np.testing.assert_array_equal, again, params)
        network = jax.jit(network)
        before = network(params, x)
        np.testing.assert_allclose(network(moved, x), before, rtol=0, atol=1e-5 * np.max(np.abs(before)))
        if batch is None:
            return
        for init, apply, variables in models():
            if not variables:
                variables.update(init(jax.random.key(1), batch))
            outputs = apply(variables, batch)
            np.testing.assert_allclose(outputs[2], outputs[0], rtol=0, atol=1e-5 * np.max(np.abs(outputs[0])))

    check()
