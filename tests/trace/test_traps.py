"""Functions in which an axis is easily freed by mistake: what is free must be free, and the rest must be pinned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn.activations import activation_function
from tests.trace.test_networks import free_groups

SHAPES = {"a": (4, 6), "b": (6,), "c": (6, 6), "d": (6, 6), "e": (6, 3), "f": (6,), "g": (2, 3)}


def hidden(p, x):
    return jnp.tanh(x @ p["a"] + p["b"])


def heads(h):
    return h.reshape(-1, 2, 3)


def talking_heads(p, x):
    """The inner neurons of each head would have to be shuffled alike, because heads are mixed."""
    return jnp.einsum("bhd,hg->bgd", heads(hidden(p, x) @ p["c"]), p["g"] @ p["g"].T).reshape(-1, 6) @ p["e"]


def attention_over_heads(p, x):
    q, k = heads(hidden(p, x) @ p["c"]), heads(hidden(p, x) @ p["d"])
    return jnp.einsum("bhg,bgd->bhd", jnp.einsum("bhd,bgd->bhg", q, k), q).reshape(-1, 6) @ p["e"]


def attention_in_heads(p, x):
    q, k = heads(hidden(p, x) @ p["c"]), heads(hidden(p, x) @ p["d"])
    weights = jax.nn.softmax(jnp.einsum("bhd,chd->hbc", q, k))
    return jnp.einsum("hbc,chd->bhd", weights, q).reshape(-1, 6) @ p["e"]


def chosen_layers(p, x):
    """The slices of a stack that is made of parameters."""
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden(p, x), jnp.stack([p["c"], p["d"]]))[0] @ p["e"]


def windows_over_neurons(p, x):
    out = jax.lax.conv_general_dilated(hidden(p, x)[:, None, :], p["f"][None, None, :3], (1,), "SAME")
    return out[:, 0] @ p["e"]


def channels(p, x):
    out = jax.lax.conv_general_dilated(hidden(p, x)[:, :, None], p["c"][:, :, None], (1,), "SAME")
    return out[:, :, 0] @ p["e"]


def window_added(p, x):
    return (hidden(p, x) @ p["c"]).at[:, :4].add(jnp.tanh(hidden(p, x) @ p["d"])[:, :4]) @ p["e"]


def parts_of_one_product(p, x):
    """As a fused projection: each part has neurons of its own."""
    y = (hidden(p, x) @ p["c"]).reshape(-1, 2, 3)
    return jnp.tanh(y[:, 0]) @ p["g"].T + jnp.tanh(y[:, 1]).sum(-1, keepdims=True)


def repeat(function, p, x):
    return jax.lax.fori_loop(0, 3, lambda _, h: function(h), hidden(p, x)) @ p["e"]


FREE, NONE = [(6, 1)], []
# Each with the groups that are free, by hand.
TRAPS = {
    "running sum": (lambda p, x: jnp.cumsum(hidden(p, x), -1) @ p["e"], NONE),
    "numbered neurons": (lambda p, x: (hidden(p, x) * jnp.arange(6.0)) @ p["e"], NONE),
    "place of the largest": (
        lambda p, x: hidden(p, x) @ p["e"] + jnp.argmax(hidden(p, x), -1)[:, None].astype(np.float32),
        NONE,
    ),
    "sorted": (lambda p, x: jnp.sort(hidden(p, x), -1) @ p["e"], NONE),
    "rolled": (lambda p, x: (hidden(p, x) + jnp.roll(hidden(p, x), 1, -1)) @ p["e"], NONE),
    "reversed": (lambda p, x: (hidden(p, x) + hidden(p, x)[:, ::-1]) @ p["e"], NONE),
    "every second": (lambda p, x: (hidden(p, x)[:, ::2] + hidden(p, x)[:, 1::2]) @ p["g"].reshape(3, 2), NONE),
    "two by two": (lambda p, x: hidden(p, x).reshape(-1, 3, 2).sum(-1) @ p["g"].reshape(3, 2), [(2, 3)]),
    "symmetric matrix": (lambda p, x: hidden(p, x) @ (p["c"] + p["c"].T) @ p["e"], FREE),
    "one matrix between two": (lambda p, x: jnp.tanh(hidden(p, x) @ p["c"]) @ p["c"].T @ p["e"], [(6, 1), (6, 1)]),
    "matrix and transposed": (lambda p, x: hidden(p, x) @ (p["c"] * p["d"].T) @ p["e"], [(6, 1), (6, 1)]),
    "quadratic form": (lambda p, x: jnp.einsum("bi,bj,ij->b", hidden(p, x), hidden(p, x), p["c"]), FREE),
    "trace": (lambda p, x: hidden(p, x) @ p["e"] * jnp.trace(p["c"]), FREE),
    "the first neuron": (lambda p, x: hidden(p, x) @ p["e"] + hidden(p, x)[:, :1], [(5, 1)]),
    "some neurons": (lambda p, x: hidden(p, x) @ p["e"] + hidden(p, x)[:, jnp.array([3, 1, 2])], NONE),
    "a neuron that depends": (
        lambda p, x: hidden(p, x) @ p["e"] + jax.lax.dynamic_slice_in_dim(hidden(p, x), jnp.argmin(x[0]), 1, 1),
        NONE,
    ),
    "the largest": (lambda p, x: hidden(p, x) @ p["e"] + jax.lax.top_k(hidden(p, x), 3)[0], NONE),
    "loop": (lambda p, x: repeat(lambda h: jnp.tanh(h @ p["c"] + p["f"]), p, x), FREE),
    "loop that rolls": (lambda p, x: repeat(lambda h: jnp.roll(h, 1, -1), p, x), NONE),
    "while": (
        lambda p, x: (
            jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ p["c"]), (0, hidden(p, x)))[1] @ p["e"]
        ),
        FREE,
    ),
    "branches": (
        lambda p, x: jax.lax.cond(x.sum() > 0, lambda h: h @ p["c"], lambda h: h @ p["d"] + h, hidden(p, x)) @ p["e"],
        FREE,
    ),
    "chosen layers": (chosen_layers, NONE),
    "talking heads": (talking_heads, [(6, 1), (3, 1)]),
    "attention over heads": (attention_over_heads, [(6, 1), (2, 1), (3, 1)]),
    "attention in heads": (attention_in_heads, [(6, 1), (2, 1), (3, 2)]),
    "heads swapped": (lambda p, x: (heads(hidden(p, x)).swapaxes(1, 2).reshape(-1, 6) + hidden(p, x)) @ p["e"], NONE),
    "parts in another order": (
        lambda p, x: (jnp.roll(hidden(p, x), -2, -1) + hidden(p, x) @ p["c"]) @ p["e"],
        [(2, 1), (4, 1)],
    ),
    "shifted by one": (lambda p, x: (jnp.pad(hidden(p, x)[:, :4], ((0, 0), (1, 1))) + hidden(p, x)) @ p["e"], NONE),
    "only some pass": (lambda p, x: jnp.where(jnp.arange(6) > 2, hidden(p, x), 0.0) @ p["e"], NONE),
    "random mask": (
        lambda p, x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (5, 6)), hidden(p, x), 0.0) @ p["e"],
        NONE,
    ),
    "Fourier transform": (lambda p, x: jnp.abs(jnp.fft.fft(hidden(p, x))) @ p["e"], NONE),
    "norm": (lambda p, x: hidden(p, x) / jnp.linalg.norm(hidden(p, x), axis=-1, keepdims=True) @ p["e"], FREE),
    "checkpoint and jit": (lambda p, x: jax.checkpoint(jax.jit(lambda x: hidden(p, x)))(x) @ p["e"], FREE),
    "windows over neurons": (windows_over_neurons, NONE),
    "channels": (channels, [(6, 1), (6, 1)]),
    "constant that differs": (lambda p, x: (hidden(p, x) * np.linspace(0, 1, 6, dtype=np.float32)) @ p["e"], NONE),
    "constant that does not": (lambda p, x: (hidden(p, x) * np.full(6, 2, np.float32)) @ p["e"], FREE),
    "repeated, then averaged": (lambda p, x: jnp.repeat(hidden(p, x), 2, -1).reshape(-1, 6, 2).mean(-1) @ p["e"], FREE),
    "repeated wrongly": (lambda p, x: jnp.tile(hidden(p, x), (1, 2)).reshape(-1, 6, 2).mean(-1) @ p["e"], NONE),
    "a window is added to": (window_added, [(2, 1), (2, 1), (4, 1), (6, 1)]),
    "a window is replaced": (
        lambda p, x: (hidden(p, x) @ p["c"]).at[:, 1:5].set(jnp.tanh(hidden(p, x) @ p["d"])[:, :4]) @ p["e"],
        [(2, 1), (4, 1), (4, 1), (6, 1)],
    ),
    "every second neuron": (lambda p, x: (hidden(p, x)[:, ::2] * hidden(p, x)[:, 1::2]) @ p["g"].T, [(3, 1)]),
    "parts of one product": (parts_of_one_product, [(3, 1), (3, 1), (6, 1)]),
    "low rank": (lambda p, x: jnp.tanh(x @ (p["a"] @ p["c"])) @ p["e"], [(6, 1), (6, 1)]),
    "reduced in order": (
        lambda p, x: (
            hidden(p, x) * jax.lax.reduce(hidden(p, x), np.float32(0), lambda a, b: a * 0.5 + b, (1,))[:, None] @ p["e"]
        ),
        NONE,
    ),
    "reduced in any order": (
        lambda p, x: hidden(p, x) * jax.lax.reduce(hidden(p, x), np.float32(1), jnp.multiply, (1,))[:, None] @ p["e"],
        FREE,
    ),
    "above the mean": (
        lambda p, x: jnp.where(hidden(p, x) > hidden(p, x).mean(1, keepdims=True), hidden(p, x), 0.0) @ p["e"],
        FREE,
    ),
    "the largest pass": (
        lambda p, x: jnp.where(x @ p["a"] >= jax.lax.top_k(x @ p["a"], 2)[0][:, 1:], x @ p["a"], 0.0) @ p["e"],
        NONE,
    ),
    "summed by segments": (
        lambda p, x: jax.ops.segment_sum(hidden(p, x), jnp.array([0, 1, 1, 0, 2]), 3) @ p["e"],
        FREE,
    ),
    "no product in between": (lambda p, x: hidden(p, x)[:, :3] + hidden(p, x)[:, 3:], NONE),
}


def random_params(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.6 * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", TRAPS)
def test_nothing_is_freed_by_mistake(name):
    function, free = TRAPS[name]
    params, x = random_params(0), jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    spec = ngjax.trace_spec(function, params, x)
    assert free_groups(spec) == sorted(free)
    function = jax.jit(function)
    before = np.asarray(function(params, x))
    if free:
        moved = ngjax.permute_params(spec, ngjax.random_permutations(jax.random.key(0), spec), params)
        np.testing.assert_allclose(function(moved, x), before, rtol=0, atol=1e-5 * np.max(np.abs(before)))
    again = ngjax.to_params(spec, ngjax.to_groups(spec, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_updates_move_as_their_parameters_do():
    def step(p, x):
        gradients = jax.grad(lambda q: jnp.sum((hidden(q, x) @ q["c"] @ q["e"]) ** 2))(p)
        return jax.tree.map(lambda weight, g: weight - 0.1 * g, p, gradients)

    params, x = random_params(0), jnp.ones((5, 4))
    spec = ngjax.trace_spec(step, params, x)
    # Outputs are parameters again, so that even inputs and outputs of the network may move.
    perms = ngjax.random_permutations(jax.random.key(0), spec)
    before, after = step(params, x), step(ngjax.permute_params(spec, perms, params), x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ngjax.permute_params(spec, perms, before), after
    )
    assert (3, 1) in free_groups(spec)


def test_what_pinned_an_axis_is_named():
    spec = ngjax.trace_spec(lambda p, x: jnp.cumsum(hidden(p, x), -1) @ p["e"], random_params(0), jnp.ones((5, 4)))
    reasons = {axis: pinned.reason for pinned in spec.pinned for axis in pinned.axes}
    assert reasons["a", 1] == reasons["b", 0] == reasons["e", 0] == "cumsum"
    assert reasons["a", 0] == "input"
    assert reasons["e", 1] == "output"
    assert reasons["c", 0] == "used by no equation"
    assert "cumsum" in str(spec)


def test_activations_are_told_by_their_values():
    """However they are written, and wherever their functions come from."""

    def by_hand(x):
        return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (x + 0.044715 * x**3)))

    names = set(ngjax.spec.ACTIVATIONS) - {"softmax", "other"}
    cases = [(name, activation_function(name)) for name in sorted(names)]
    cases += [
        ("gelu", by_hand),
        ("silu", lambda x: x / (1 + jnp.exp(-x))),
        ("relu", lambda x: jnp.where(x > 0, x, 0.0)),
        ("softmax", jax.nn.softmax),
        ("other", lambda x: x**2),
        ("none", lambda x: 0.5 * x),
    ]
    for name, function in cases:
        spec = ngjax.trace_spec(
            lambda p, x, function=function: function(x @ p["a"] + p["b"]) @ p["e"], random_params(0), jnp.ones((5, 4))
        )
        groups = [group for group in spec.node_groups if group.role == "hidden"]
        assert [group.activation for group in groups] == [name]


def test_the_graph_of_a_small_network():
    """Node groups, edge groups and levels of an MLP are those of `mlp_spec`."""
    sizes = (3, 5, 4, 2)
    by_hand = ngjax.mlp_spec(sizes, activation="tanh")
    params = by_hand.unflatten([jax.ShapeDtypeStruct(p.shape, p.dtype) for p in by_hand.params])

    def forward(p, x):
        for i in range(3):
            x = x @ p[f"layer_{i}"]["kernel"] + p[f"layer_{i}"]["bias"]
            x = jnp.tanh(x) if i < 2 else x
        return x

    spec = ngjax.trace_spec(forward, params, jax.ShapeDtypeStruct((7, 3), jnp.float32))
    for ours, theirs in zip(spec.node_groups, by_hand.node_groups, strict=True):
        assert (ours.size, ours.role, ours.level, ours.activation, ours.slots, ours.bias) == (
            *(theirs.size, theirs.role, theirs.level, theirs.activation, theirs.slots, theirs.bias),
        )
    assert [group.view for group in spec.edge_groups] == [group.view for group in by_hand.edge_groups]
    assert spec.from_json(spec.to_json()) == spec


def test_bad_input():
    params, x = random_params(0), jnp.ones((5, 4))
    with pytest.raises(ValueError, match="control flow depends on values"):
        ngjax.trace_spec(lambda p, x: x @ p["a"] if x.sum() > 0 else x @ p["a"] * 2, params, x)
    with pytest.raises(ValueError, match="at least one floating parameter"):
        ngjax.trace_spec(lambda p, x: x, {"n": jnp.arange(3)}, x)
    with pytest.raises(TypeError, match="complex64"):
        ngjax.trace_spec(lambda p, x: jnp.real(p["w"]) @ x, {"w": jnp.ones((2, 5), jnp.complex64)}, x)
    # Integers and keys have no home, and are taken from like=.
    spec = ngjax.trace_spec(
        lambda p, x: hidden(p, x) @ p["e"] * p["steps"].astype(np.float32), params | {"steps": jnp.int32(3)}, x
    )
    assert not next(param for param in spec.params if param.path[-1].key == "steps").axes
