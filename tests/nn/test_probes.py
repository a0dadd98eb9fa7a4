import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn.activations import activation_function, apply_activations
from ngjax.nn.probes import probe_values
from ngjax.nn.topology import BlockTopology, ListTopology
from ngjax.spec import ACTIVATIONS
from ngjax.zoo.siren import apply_siren
from tests.nn.small import jit, one, siren_spec, sirens

SIZES = (2, 5, 4, 1)
INPUTS = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 6)), jnp.float32)  # a row to spare


def both(spec, network):
    groups, graph = ngjax.to_groups(spec, network), ngjax.to_graph(spec, network)
    return jit(
        lambda: (
            probe_values(BlockTopology(spec, reverse=True), groups.nodes, groups.edges, INPUTS[:2], 3),
            probe_values(ListTopology(graph, reverse=True), graph.nodes.features, (graph.edges.features,), INPUTS, 3),
        )
    )()


def test_values_are_those_of_the_network():
    spec, network = siren_spec(SIZES), one(sirens(SIZES, 1), 0)
    expected = apply_siren(jax.tree.map(jnp.asarray, network), jnp.asarray(INPUTS[:2].T))  # no offset at the output
    first = np.sin(30 * (np.asarray(INPUTS)[:2].T @ network["layer_0"]["kernel"] + network["layer_0"]["bias"]))
    for values in both(spec, network):
        assert values.shape == (12, 6)
        np.testing.assert_array_equal(values[:2], INPUTS[:2])
        np.testing.assert_allclose(values[2:7], first.T, atol=1e-5)
        np.testing.assert_allclose(values[11:], expected.T, atol=1e-5)


def test_values_of_a_network_with_another_activation():
    spec, network = ngjax.mlp_spec(SIZES, activation="relu"), one(sirens(SIZES, 1), 0)
    x = np.asarray(INPUTS)[:2].T
    for i in range(3):
        x = x @ network[f"layer_{i}"]["kernel"] + network[f"layer_{i}"]["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    for values in both(spec, network):
        np.testing.assert_allclose(values[11:], x.T, atol=1e-5)


def test_rows_take_their_own_activation():
    x = jnp.linspace(-2, 2, 5)
    functions = {name: i for i, name in enumerate(ACTIVATIONS) if name not in ("softmax", "other")}
    index = jnp.asarray([*functions.values(), ACTIVATIONS.index("softmax")])
    rows = jnp.tile(x, (len(index), 1))
    result, gradient = jit(
        lambda r: (apply_activations(r, index), jax.grad(lambda r: apply_activations(r, index)[:-1].sum())(r))
    )(rows)
    expected = jit(lambda: [activation_function(name)(x) for name in functions])()
    np.testing.assert_allclose(result[:-1], np.stack(expected), atol=1e-6)
    assert np.all(np.isnan(result[-1])), "softmax is no function of one number"
    assert np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match="'softmax' is not an elementwise function; known are none, relu"):
        activation_function("softmax")
