"""Specs traced from networks of all frameworks: the free groups are those written down by hand."""

import functools
import math

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ngjax
from tests import test_six_architectures as six


def free_groups(spec):
    """Sizes of the free permutations, each with the number of places that have one of their own."""
    return sorted(
        (action.size, math.prod(spec.action[id].size for id in action.per))
        for action in spec.actions
        if action.kind == "permutation"
    )


def generic(params):
    """Parameters none of which is what an initializer made it: zeros and ones hide errors."""

    def change(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        change = 0.3 * np.abs(np.sin(1.7 * np.arange(leaf.size) + leaf.size)).reshape(leaf.shape)
        return jnp.asarray(np.asarray(leaf) + change, leaf.dtype)

    return jax.tree.map(change, params)


def deviation(f, params, spec, *inputs, seed=1):
    """Largest change of the results under random permutations, in units of their scale."""
    f = eqx.filter_jit(f)
    before = jax.tree.leaves(f(params, *inputs))
    arrays, static = eqx.partition(params, eqx.is_array)
    moved = ngjax.permute_params(spec, ngjax.random_permutations(jax.random.key(seed), spec), arrays)
    after = jax.tree.leaves(f(eqx.combine(moved, static), *inputs))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(moved), strict=True))
    return max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(a)))
        for a, b in zip(map(np.asarray, before), map(np.asarray, after), strict=True)
        if a.size
    )


def check(f, params, *inputs, free, loose=0, tolerance=1e-5):
    params = generic(params)
    spec = ngjax.trace_spec(f, params, *inputs)
    assert free_groups(spec) == sorted(free)
    assert spec.num_loose == loose
    assert deviation(f, params, spec, *inputs) < tolerance
    return spec, params


SIX = {
    "dense_net": six.dense_net,
    "attention, heads": lambda: six.attention("heads"),
    "attention, flat": lambda: six.attention("flat"),
    "attention, interleaved": lambda: six.attention("interleaved"),
    "gated_unit": six.gated_unit,
    "group_norm_block": six.group_norm_block,
    "scanned_residual": six.scanned_residual,
    "scanned_chain": six.scanned_chain,
    "scanned_attention": six.scanned_attention,
    "tied_embeddings": six.tied_embeddings,
}


@pytest.mark.parametrize("name", SIX)
def test_the_trace_finds_what_was_written_by_hand(name):
    case = SIX[name]()
    params = six.perturbed_params(case, seed=0)
    inputs = case.inputs(np.random.default_rng(1))
    spec = ngjax.trace_spec(case.forward, params, inputs)
    assert free_groups(spec) == free_groups(case.spec)
    assert deviation(case.forward, params, spec, inputs) < 1e-5
    # Each axis is free where it is free by hand, and axes share a group where they do by hand.
    for ours, theirs in zip(spec.params, case.spec.params, strict=True):
        assert ours.path == theirs.path
        assert [spec.is_free(id) for id in ours.axes] == [case.spec.is_free(id) for id in theirs.axes], ours.path
    # Scalars that have a place by hand have one, and everything comes back.
    assert spec.num_loose <= case.spec.num_loose
    again = ngjax.to_params(spec, ngjax.to_graph(spec, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(4, (3, 3))(x)))
        y = nn.relu(norm()(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(x + norm()(nn.Conv(4, (3, 3))(y)))
        x = nn.Conv(5, (3, 3), strides=2)(x) + nn.Conv(5, (1, 1), strides=2)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Conv(5, (3, 3), feature_group_count=5)(x)
        return nn.Dense(3)(nn.gelu(nn.Dense(7)(x.reshape(x.shape[0], -1))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens) + self.param("positions", nn.initializers.normal(1.0), (9, 8))[: tokens.shape[1]]
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(5)(x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=2)(x).reshape(x.shape[0], -1, 6)
        tokens = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(tokens.shape[-1])(nn.gelu(nn.Dense(10)(tokens))).swapaxes(1, 2)
        return nn.Dense(3)((x + nn.Dense(6)(nn.gelu(nn.Dense(7)(nn.LayerNorm()(x))))).mean(1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(6))(x)
        x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        return nn.Dense(2)(nn.RNN(nn.GRUCell(4))(x)[:, -1])


class Squeezed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(6, (3, 3))(x)))
        gate = nn.sigmoid(nn.Dense(6)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        x = nn.ConvTranspose(5, (2, 2), strides=(2, 2))(x * gate[:, None, None, :])
        x = jnp.concatenate([x, nn.Conv(3, (3, 3))(x)], -1)
        return nn.Dense(2)(nn.RMSNorm()(x).mean((1, 2)))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.WeightNorm(nn.Dense(5))(x)))


class Siren(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.sin(30 * nn.Dense(6)(x))
        return nn.Dense(1)(jnp.sin(30 * nn.Dense(5)(x)))


IMAGES = (2, 8, 8, 3)
LINEN = {
    "ResNet": (Residual, IMAGES, [(4, 1), (6, 1), (5, 1), (7, 1)]),
    "transformer": (Transformer, None, [(8, 1), (2, 1), (4, 2), (4, 2), (12, 1)]),
    "mixer": (Mixer, IMAGES, [(6, 1), (10, 1), (7, 1)]),
    "LSTM and GRU": (Recurrent, (2, 3, 2), [(6, 1), (5, 1), (4, 1)]),
    "group norm, squeeze and excitation": (Squeezed, IMAGES, [(2, 1), (3, 2), (4, 1), (5, 1), (3, 1)]),
    "weight norm": (Normalized, (3, 4), [(5, 1)]),
    "SIREN": (Siren, (5, 2), [(6, 1), (5, 1)]),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module, shape, free = LINEN[name]
    inputs = jnp.arange(14).reshape(2, 7) % 11 if shape is None else jax.random.normal(jax.random.key(5), shape)
    model = module()
    params = jax.jit(model.init)(jax.random.key(0), inputs)
    # sin(30 x) makes much of rounding
    spec, params = check(model.apply, params, inputs, free=free, tolerance=1e-4 if name == "SIREN" else 1e-5)
    again = ngjax.to_params(spec, ngjax.to_groups(spec, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # Something feeds every hidden neuron, but for the state that a recurrent network starts with.
    fed = {edges.target for edges in spec.edge_groups}
    assert all(g.name in fed or g.name.startswith("state") for g in spec.node_groups if g.role != "input")


def test_kernels_keep_their_shape():
    """Of 3 x 1, which is not 1 x 3; of places outside the kernel there are none."""

    class Separable(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 1))(x))
            x = nn.relu(nn.Conv(4, (1, 7), feature_group_count=4)(x))
            return nn.Conv(2, (1, 1))(x).mean((1, 2))

    model = Separable()
    x = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    spec = ngjax.trace_spec(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)
    assert [group.kernel_shape for group in spec.edge_groups if group.view] == [(3, 1), (1, 7), ()]


def test_llama():
    """Grouped queries, rotary positions (whose dimensions are pinned), gated units, causal mask."""
    width, hidden, heads, dim = 6, 8, 2, 4

    def rotate(x):
        angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * 10.0 ** -jnp.arange(2.0)
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1
        )

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * weight

    def forward(p, tokens):
        x = p["embedding"][tokens]
        h = norm(x, p["norm1"])
        q = rotate((h @ p["q"]).reshape(*h.shape[:2], 2 * heads, dim))
        k = jnp.repeat(rotate((h @ p["k"]).reshape(*h.shape[:2], heads, dim)), 2, axis=2)
        v = jnp.repeat((h @ p["v"]).reshape(*h.shape[:2], heads, dim), 2, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        x = x + jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*h.shape[:2], -1) @ p["o"]
        h = norm(x, p["norm2"])
        return (x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]) @ p["head"]

    shapes = {
        "embedding": (11, width),
        "norm1": (width,),
        "norm2": (width,),
        "q": (width, 2 * heads * dim),
        "k": (width, heads * dim),
        "v": (width, heads * dim),
        "o": (2 * heads * dim, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "head": (width, 11),
    }
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}
    tokens = jnp.arange(8).reshape(2, 4)
    spec, _ = check(forward, params, tokens, free=[(width, 1), (hidden, 1), (heads, 1), (2, heads), (dim, heads)])
    reasons = {pinned.reason for pinned in spec.pinned if ("q", 1) in pinned.axes}
    assert reasons
    assert not reasons & {"", "output"}


def test_experts_have_neurons_of_their_own():
    def forward(p, x):
        gates = jax.nn.softmax(x @ p["gate"], -1)
        h = jax.nn.relu(jnp.einsum("bn,enm->bem", x, p["up"]))
        return jnp.einsum("bem,emo,be->bo", h, p["down"], gates)

    rng = np.random.default_rng(0)
    shapes = {"gate": (5, 3), "up": (3, 5, 6), "down": (3, 6, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    check(forward, params, jnp.ones((4, 5)), free=[(3, 1), (6, 3)])


def test_haiku():
    def network(x):
        x = hk.Linear(6)(x)
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.MultiHeadAttention(2, 3, model_size=6, w_init=hk.initializers.RandomNormal())(h, h, h)
        return hk.Linear(2)(jax.nn.gelu(x))

    model = hk.without_apply_rng(hk.transform(network))
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    check(model.apply, model.init(jax.random.key(1), x), x, free=[(6, 1), (2, 1), (3, 2), (3, 2)])


def test_equinox():
    """Parameters without batch, channels before space, functions among the leaves."""

    class Network(eqx.Module):
        convolutions: list
        head: eqx.nn.MLP

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.convolutions = [eqx.nn.Conv2d(3, 4, 3, key=keys[0]), eqx.nn.Conv2d(4, 5, 3, key=keys[1])]
            self.head = eqx.nn.MLP(5 * 16, 2, 7, 1, key=keys[2])

        def __call__(self, x):
            for convolution in self.convolutions:
                x = jax.nn.relu(convolution(x))
            return self.head(x.reshape(-1))

    def forward(model, x):
        return jax.vmap(model)(x)

    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    spec, _ = check(forward, Network(jax.random.key(1)), x, free=[(4, 1), (5, 1), (7, 1)])
    kernels = [group for group in spec.edge_groups if group.view is not None]
    assert [group.kernel_shape for group in kernels] == [(3, 3), (3, 3), (16,), ()]  # 16 pixels of each channel


def test_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs, use_running_average=True)
            self.head = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    spec, _ = check(lambda s, x: nnx.merge(graph, s)(x), nnx.to_pure_dict(state), x, free=[(6, 1)])
    assert {"mean", "var"} <= {path[-1].key for path in (param.path for param in spec.params)}


def test_a_carried_state_moves_with_its_neurons():
    cell = nn.LSTMCell(5)
    carry, x = (jnp.ones((2, 5)), 0.3 * jnp.ones((2, 5))), jnp.ones((2, 3))
    params = jax.jit(cell.init)(jax.random.key(0), carry, x)

    def step(params, carry, x):
        carry, h = cell.apply(params, carry, x)
        return carry, h.sum(-1)

    assert free_groups(ngjax.trace_spec(step, params, carry, x)) == []
    assert free_groups(ngjax.trace_spec(step, params, carry, x, carries={0: 0})) == [(5, 1)]
    with pytest.raises(ValueError, match=r"carries names input 2.*2 inputs"):
        ngjax.trace_spec(step, params, carry, x, carries={2: 0})
