"""NFN: its layer by hand, and equivariance where edges come in blocks, parallel groups and kernels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.baselines import NFN
from ngjax.baselines.nfn import NFNLayer
from ngjax.nn import EncoderConfig
from ngjax.nn.topology import BlockTopology
from ngjax.optimizers import GraphRule
from ngjax.optimizers.parts import list_spec

SIZES = (2, 3, 4, 1)
WIDTH = 3


def random_variables(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def layer_by_hand(params, biases, weights):
    """One neuron and one weight after the other, from biases `[n, d]` and weights `[m, n, d]` of a chain."""
    zero = np.zeros(biases[0].shape[-1])
    of_nodes = np.mean([x.mean(axis=0) for x in biases], axis=0)
    network = np.concatenate([of_nodes, np.mean([x.mean(axis=(0, 1)) for x in weights], axis=0)])

    def seen(layer, i):
        incoming = weights[layer - 1][:, i].mean(axis=0) if layer > 0 else zero
        outgoing = weights[layer][i].mean(axis=0) if layer < len(weights) else zero
        return np.concatenate([biases[layer][i], incoming, outgoing])

    def neuron(layer, i):
        inputs = np.concatenate([seen(layer, i), biases[layer].mean(axis=0), network])
        return inputs @ params["node"]["kernel"] + params["node"]["bias"]

    def weight(layer, i, j):
        group = weights[layer]
        inputs = {
            "edge": group[i, j],
            "edge_source": np.concatenate([seen(layer, i), group[i].mean(axis=0)]),
            "edge_target": np.concatenate([seen(layer + 1, j), group[:, j].mean(axis=0)]),
            "edge_shared": np.concatenate([group.mean(axis=(0, 1)), network]),
        }
        return sum(x @ params[name]["kernel"] for name, x in inputs.items()) + params["edge"]["bias"]

    nodes = np.concatenate([[neuron(layer, i) for i in range(n)] for layer, n in enumerate(SIZES)])
    return nodes, [
        np.array([[weight(layer, i, j) for j in range(SIZES[layer + 1])] for i in range(SIZES[layer])])
        for layer in range(len(weights))
    ]


def test_layer_by_hand():
    rng = np.random.default_rng(1)
    biases = [rng.standard_normal((n, WIDTH)).astype(np.float32) for n in SIZES]
    weights = [rng.standard_normal((m, n, WIDTH)).astype(np.float32) for m, n in itertools.pairwise(SIZES)]
    layer = NFNLayer(5)
    topology = BlockTopology(ngjax.mlp_spec(SIZES), reverse=False)
    arguments = jnp.concatenate(biases), tuple(jnp.asarray(w[None]) for w in weights)
    variables = random_variables(jax.eval_shape(lambda: layer.init(jax.random.key(0), topology, *arguments)))
    nodes, edges = jax.jit(lambda v: layer.apply(v, topology, *arguments))(variables)
    expected_nodes, expected_edges = layer_by_hand(variables["params"], biases, weights)
    np.testing.assert_allclose(nodes, expected_nodes, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(edges, expected_edges, strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-5)


def heads_in_a_residual_stream(params, x):
    stream = x @ params["in"]
    heads = jnp.tanh(jnp.einsum("bi,ihd->bhd", stream, params["into"]))
    heads = jnp.tanh(jnp.einsum("bhd,hde->bhe", heads, params["within"]))
    return (stream + jnp.einsum("bhd,hdi->bi", heads, params["out_of"])) @ params["out"]


def convolutions(params, x):
    for i in range(3):
        x = jax.lax.conv_general_dilated(
            x, params[f"kernel_{i}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x + params[f"bias_{i}"])
    return x


NETWORKS = {
    "heads": (
        heads_in_a_residual_stream,
        {"in": (2, 6), "into": (6, 3, 4), "within": (3, 4, 5), "out_of": (3, 5, 6), "out": (6, 2)},
        (1, 2),
    ),
    "convolutions": (
        convolutions,
        {"kernel_0": (3, 3, 1, 4), "kernel_1": (3, 1, 4, 5), "kernel_2": (1, 1, 5, 2)}
        | {f"bias_{i}": (n,) for i, n in enumerate((4, 5, 2))},
        (1, 4, 4, 1),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_neurons_permutes_what_a_rule_says_of_them(name):
    function, shapes, input_shape = NETWORKS[name]
    rng = np.random.default_rng(2)
    spec = ngjax.trace_spec(function, {key: jnp.zeros(shape) for key, shape in shapes.items()}, jnp.zeros(input_shape))
    rule = GraphRule(
        NFN(4, 2, EncoderConfig(reverse_edges=False, positions="depth", kernel_range=(1, 3, 3))), width=4, num_hidden=1
    )
    paths = tuple(param.path for param in spec.params)
    ordered = list_spec(spec, paths, tuple(param.shape for param in spec.params))
    channels = [
        {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()} for _ in range(14)
    ]
    permutations = ngjax.random_permutations(jax.random.key(3), spec)
    assert sum(action.kind == "permutation" for action in spec.actions) >= 2

    def stacked(trees):
        return tuple(jnp.stack(leaves, axis=-1) for leaves in zip(*map(jax.tree.leaves, trees), strict=True))

    def heads(variables, trees):
        return rule.apply(variables, stacked(trees), ordered)

    variables = random_variables(jax.eval_shape(lambda: rule.init(jax.random.key(0), stacked(channels), ordered)))

    @jax.jit
    def check(variables):
        before = heads(variables, channels)
        after = heads(variables, [ngjax.permute_params(spec, permutations, tree) for tree in channels])
        moved = [
            ngjax.permute_params(spec, permutations, spec.unflatten([head[..., k] for head in before]))
            for k in range(2)
        ]
        return before, after, stacked(moved)

    before, after, moved = check(variables)
    scale = max(np.max(np.abs(head)) for head in before)
    assert max(np.max(np.abs(a - b)) for a, b in zip(before, moved, strict=True)) > 1e-2 * scale
    assert max(np.max(np.abs(a - b)) for a, b in zip(after, moved, strict=True)) < 1e-5 * scale


def test_what_it_cannot_read():
    spec = ngjax.mlp_spec(SIZES)
    graph = ngjax.to_groups(spec, spec.unflatten([jnp.zeros(param.shape) for param in spec.params]))
    with pytest.raises(ValueError, match="argument spec is missing"):
        NFN().init(jax.random.key(0), graph)
    with pytest.raises(ValueError, match="expected reverse_edges=False"):
        NFN(encoder=EncoderConfig(positions="depth")).init(jax.random.key(0), graph, spec=spec)
