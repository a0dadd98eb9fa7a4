import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.batching import budget_for, unbatch_graphs
from ngjax.nn.topology import ListTopology
from tests.nn.small import one, siren_spec, sirens

ARCHITECTURES = ((2, 3, 1), (1, 4, 2, 1))
SPECS = [siren_spec(sizes) for sizes in ARCHITECTURES]  # 6 nodes and 9 edges, 8 nodes and 14 edges
NETWORKS = [one(sirens(sizes, 1, seed=i), 0) for i, sizes in enumerate(ARCHITECTURES)]
BUDGET = ngjax.GraphBudget(4, 20, 30, 9)


@pytest.fixture(scope="module")
def graphs():
    return [ngjax.to_graph(spec, network) for spec, network in zip(SPECS, NETWORKS, strict=True)]


@pytest.fixture(scope="module")
def batch(graphs):
    return jax.jit(lambda g: ngjax.batch_graphs(g, BUDGET))(graphs)


def test_graphs_stand_one_after_the_other(batch, graphs):
    first, second = graphs
    np.testing.assert_array_equal(batch.nodes.features[:6], first.nodes.features)
    np.testing.assert_array_equal(batch.nodes.features[6:14], second.nodes.features)
    np.testing.assert_array_equal(batch.edges.features[9:23], second.edges.features)
    np.testing.assert_array_equal(batch.senders[:9], first.senders)
    np.testing.assert_array_equal(batch.receivers[9:23], second.receivers + 6)
    assert batch.nodes.mask.tolist() == [True] * 14 + [False] * 6
    assert batch.nodes.graph.tolist() == [0] * 6 + [1] * 8 + [4] * 6
    assert batch.edges.mask[:, 0].tolist() == [True] * 23 + [False] * 7
    assert batch.globals.mask.tolist() == [True, True, False, False]
    for name in ("role", "group", "position", "activation", "level"):
        np.testing.assert_array_equal(getattr(batch.nodes, name)[6:14], getattr(second.nodes, name))


def test_padding_belongs_to_the_first_padding_graph(batch):
    assert batch.n_node.tolist() == [6, 8, 6, 0]
    assert batch.n_edge.tolist() == [9, 14, 7, 0]
    assert set(np.asarray(batch.senders[23:]).tolist()) == {19}
    assert not np.any(batch.nodes.features[14:])
    assert not np.any(batch.edges.features[23:])


def test_no_place_of_a_graph_stands_for_two_nodes(graphs):
    """Also where a batch is full and a budget has more nodes per graph than its last graph."""
    for budget in (BUDGET, ngjax.GraphBudget(2, 14, 23, 14)):
        topology = ListTopology(ngjax.batch_graphs(graphs, budget), reverse=False)
        mask = np.asarray(topology.dense_mask())
        assert mask.sum(axis=1).tolist() == [6, 8, 0, 0][: budget.graphs]
        nodes = jnp.arange(budget.nodes, dtype=jnp.float32)[:, None]
        dense = topology.dense_nodes(nodes)
        assert dense[1, :8, 0].tolist() == list(range(6, 14))
        assert topology.from_dense_nodes(dense)[:14, 0].tolist() == list(range(14))


def test_a_batch_is_taken_apart_again(batch, graphs):
    for spec, network, graph in zip(SPECS, NETWORKS, unbatch_graphs(batch, graphs), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ngjax.to_params(spec, graph), network)


def test_budgets_hold_any_mixture(graphs):
    assert budget_for(SPECS, 3, multiple=10) == ngjax.GraphBudget(3, 30, 50, 8)
    assert budget_for(SPECS, 1) == ngjax.GraphBudget(1, 64, 64, 8)
    with pytest.raises(ValueError, match="at least one spec, received none"):
        budget_for([], 3)
    ngjax.batch_graphs([graphs[1]] * 3, budget_for(SPECS, 3))


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"graphs": 1}, "have 2 graphs together, more than the budget's graphs=1"),
        ({"nodes": 13}, "have 14 nodes together, more than the budget's nodes=13"),
        ({"edges": 22}, "have 23 edges together, more than the budget's edges=22"),
        ({"nodes_per_graph": 7}, "graph 1 has 8 nodes, more than the budget's nodes_per_graph=7"),
    ],
)
def test_graphs_larger_than_the_budget_are_named(limits, match, graphs):
    with pytest.raises(ValueError, match=match):
        ngjax.batch_graphs(graphs, BUDGET._replace(**limits))


def test_other_wrong_batches_are_named(graphs):
    with pytest.raises(ValueError, match="at least one graph, received none"):
        ngjax.batch_graphs([], BUDGET)
    stacked = ngjax.to_graph(SPECS[0], sirens(ARCHITECTURES[0], 3))
    with pytest.raises(ValueError, match=r"graph 1: .*without batch axes.*\(3, 6, 1\)"):
        ngjax.batch_graphs([graphs[0], stacked], BUDGET)
    with pytest.raises(ValueError, match="graph 0: .*n_node"):
        ngjax.batch_graphs([ngjax.batch_graphs(graphs, BUDGET)], BUDGET)
    featured = jax.tree.map(lambda x: np.stack([x, x], axis=-1), NETWORKS[1])
    two_features = ngjax.to_graph(SPECS[1], featured, feature_axis=True)
    with pytest.raises(ValueError, match=r"same number of features per scalar; received \[1, 2\]"):
        ngjax.batch_graphs([graphs[0], two_features], BUDGET)
