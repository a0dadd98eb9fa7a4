import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn import WeightStatistics, weight_statistics
from ngjax.nn.encoder import destandardize, fourier_features, kernel_index, standardize
from ngjax.nn.topology import BlockTopology, ListTopology
from tests.nn.small import jit, one, siren_spec, sirens

SIZES = (2, 3, 1)
SPEC = siren_spec(SIZES)


def test_fourier_features_are_cosines_then_sines_of_whole_circles():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 3)).astype(np.float32)
    frequencies = (3 * rng.standard_normal((2, 3, 4))).astype(np.float32)
    angles = 2 * np.pi * np.einsum("ekc,kcm->em", x.astype(np.float64), frequencies.astype(np.float64))
    result = jit(fourier_features)(x, frequencies)
    assert result.shape == (5, 1, 8)
    np.testing.assert_allclose(result[:, 0], np.concatenate([np.cos(angles), np.sin(angles)], axis=-1), atol=3e-5)


def test_kernel_positions_share_rows_by_their_offset_from_the_centre():
    assert kernel_index((1, 3, 3), (1, 3, 3)).tolist() == list(range(9))
    assert kernel_index((1, 1, 1), (1, 3, 3)).tolist() == [4]  # a dense weight is the centre
    assert kernel_index((1, 1, 3), (1, 3, 3)).tolist() == [3, 4, 5]
    assert kernel_index((1, 1, 5), (1, 1, 3)).tolist() == [0, 0, 1, 2, 2]  # beyond the range: the outermost
    assert kernel_index((1, 1, 2), (1, 1, 3)).tolist() == [0, 1]  # an even kernel has its centre at 1
    assert kernel_index((2, 3, 1), (1, 1, 1)).tolist() == [0] * 6


def test_statistics_are_those_of_each_layer():
    params = sirens(SIZES, 7)
    statistics = weight_statistics(SPEC, params)
    for i in range(2):
        kernel, bias = params[f"layer_{i}"]["kernel"], params[f"layer_{i}"]["bias"]
        assert statistics.weight_mean[i] == pytest.approx(kernel.mean(), abs=1e-7)
        assert statistics.weight_std[i] == pytest.approx(kernel.std(), rel=1e-5)
        assert statistics.bias_mean[i] == pytest.approx(bias.mean(), abs=1e-7)
        assert statistics.bias_std[i] == pytest.approx(bias.std(), rel=1e-5)


def test_statistics_of_equal_or_missing_biases_divide_by_one():
    params = sirens(SIZES, 7)
    params["layer_0"]["bias"] = np.full_like(params["layer_0"]["bias"], 3.0)
    assert weight_statistics(SPEC, params).bias_std[0] == 1
    kernels = {name: {"kernel": layer["kernel"][0]} for name, layer in params.items()}
    statistics = weight_statistics(ngjax.infer_spec(kernels), kernels)
    assert (statistics.bias_mean, statistics.bias_std) == ((0.0, 0.0), (1.0, 1.0))


def test_standardization_of_every_layer_and_back():
    statistics = WeightStatistics((1.0, 2.0), (10.0, 100.0), (3.0, 4.0), (5.0, 7.0))
    network = one(sirens(SIZES, 1), 0)
    groups, graph = ngjax.to_groups(SPEC, network), ngjax.to_graph(SPEC, network)
    expected_nodes = np.concatenate(
        [[0, 0], (network["layer_0"]["bias"] - 3) / 5, (network["layer_1"]["bias"] - 4) / 7]
    )
    expected_edges = [(network["layer_0"]["kernel"] - 1) / 10, (network["layer_1"]["kernel"] - 2) / 100]
    flat = np.concatenate([e.ravel() for e in expected_edges])

    def there_and_back(topology, nodes, edges):
        there = standardize(topology, nodes, edges, statistics)
        return there, destandardize(topology, *there, statistics)

    (nodes, edges), back = jit(lambda: there_and_back(BlockTopology(SPEC, reverse=False), groups.nodes, groups.edges))()
    np.testing.assert_allclose(nodes[:, 0], expected_nodes, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([np.ravel(e) for e in edges]), flat, rtol=1e-5)
    np.testing.assert_allclose(back[0], groups.nodes, atol=1e-6)
    np.testing.assert_allclose(back[1][1], groups.edges[1], atol=1e-5)

    topology = ListTopology(graph, reverse=False)
    (nodes, edges), _ = jit(lambda: there_and_back(topology, graph.nodes.features, (graph.edges.features,)))()
    np.testing.assert_allclose(nodes[:, 0], expected_nodes, rtol=1e-6)
    np.testing.assert_allclose(jnp.ravel(edges[0]), flat, rtol=1e-5)
