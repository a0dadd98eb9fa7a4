"""The mathematics of NG-GNN by hand, and where its input is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn import NGGNN
from ngjax.nn import gnn as module
from ngjax.nn.gnn import aggregate
from ngjax.nn.linear import LinearMap
from ngjax.nn.topology import BlockTopology, ListTopology
from tests.nn.small import ENCODER, gnn, jit, one, siren_spec, sirens, variables_of

SIZES = (2, 3, 4, 1)
SPEC = siren_spec(SIZES)
EDGES = [  # source, target
    *((i, 2 + j) for i in range(2) for j in range(3)),
    *((2 + i, 5 + j) for i in range(3) for j in range(4)),
    *((5 + i, 9) for i in range(4)),
]


def graph():
    return ngjax.to_graph(SPEC, one(sirens(SIZES, 1), 0))


def by_loop(messages, edges, mean_log_degree):
    """Mean, min, max and deviation of incoming messages, plain and scaled by the log of the degree."""
    rows = []
    for node in range(10):
        incoming = np.array([m for m, (_, target) in zip(messages, edges, strict=True) if target == node])
        width = messages.shape[1]
        if not len(incoming):
            plain = np.concatenate([np.zeros(3 * width), np.full(width, 1e-5**0.5)])
        else:
            std = np.sqrt(np.maximum(incoming.var(0), 1e-5))
            plain = np.concatenate([incoming.mean(0), incoming.min(0), incoming.max(0), std])
        rows.append(np.concatenate([plain, plain * np.log(len(incoming) + 1) / mean_log_degree]))
    return np.array(rows)


@pytest.mark.parametrize("reverse", [False, True])
def test_aggregation_by_a_loop_over_edges(reverse):
    edges = EDGES + [(b, a) for a, b in EDGES] if reverse else EDGES
    # Far from zero, where a variance from one pass loses its digits; node 9 has one deviating message.
    messages = (1000 + np.random.default_rng(0).standard_normal((len(edges), 3))).astype(np.float32)
    expected = by_loop(messages.astype(np.float64), edges, 1.7)

    def bundles(values):
        parts, start = [], 0
        for m, n in [(2, 3), (3, 4), (4, 1)] * (1 + reverse):
            parts.append(jnp.asarray(values[start : start + m * n].reshape(1, m, n, -1)))
            start += m * n
        return tuple(parts)

    blocks = jit(lambda: aggregate(BlockTopology(SPEC, reverse), bundles(messages), 1.7))()
    listed = jit(lambda g: aggregate(ListTopology(g, reverse), (jnp.asarray(messages),), 1.7))(graph())
    for result in (blocks, listed):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-3)
        deviations = slice(9, 12)
        np.testing.assert_allclose(result[:, deviations], expected[:, deviations], rtol=1e-3)


def test_degrees():
    degrees = {False: [0, 0, 2, 2, 2, 3, 3, 3, 3, 4], True: [3, 3, 6, 6, 6, 4, 4, 4, 4, 4]}
    for reverse, expected in degrees.items():
        assert BlockTopology(SPEC, reverse).degree()[:, 0].tolist() == expected
        assert ListTopology(graph(), reverse).degree()[:, 0].tolist() == expected
    outgoing = [3, 3, 4, 4, 4, 1, 1, 1, 1, 0]
    for topology in (BlockTopology(SPEC, False), ListTopology(graph(), False)):
        assert topology.degree(outgoing=True)[:, 0].tolist() == outgoing
        shapes = [(1, m, n, 1) for m, n in itertools.pairwise(SIZES)]
        ones = tuple(map(jnp.ones, shapes)) if isinstance(topology, BlockTopology) else (jnp.ones((len(EDGES), 1)),)
        assert topology.sum(ones, outgoing=True)[:, 0].tolist() == outgoing


def test_the_degree_scaler_is_that_of_each_network():
    """With reverse edges, as the reference's is not: giving the mean of log(degree + 1) changes nothing."""
    degrees = np.array([3, 3, 6, 6, 6, 4, 4, 4, 4, 4])
    models = [gnn(num_layers=1, mean_log_degree=mean) for mean in (None, float(np.mean(np.log(degrees + 1))), 1.0)]
    variables = variables_of(models[0], SPEC)
    own, given, other = jit(lambda g: [m.apply(variables, g, spec=SPEC).nodes.features for m in models])(graph())
    np.testing.assert_allclose(own, given, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(own - other)) > 1e-2


def test_extremes_share_their_derivative():
    """Equal messages share it, and it is finite: one bundle by axes, the edge list by segments."""
    values = np.zeros((1, 2, 3, 1), np.float32)
    values[0, 1, 2] = 1
    spec = siren_spec((2, 3))
    single = ngjax.to_graph(spec, one(sirens((2, 3), 1), 0))

    def blocks(x):
        return jnp.sum(BlockTopology(spec, reverse=False).max((x,)))

    def listed(x):
        return jnp.sum(ListTopology(single, reverse=False).max((x.reshape(6, 1),)))

    expected = np.array([[0.5, 0.5, 0], [0.5, 0.5, 1]]).reshape(values.shape)
    for function in (blocks, listed):
        np.testing.assert_allclose(jit(jax.grad(function))(jnp.asarray(values)), expected)


def test_dropout_draws_only_while_training():
    model = NGGNN(features=4, num_layers=2, encoder=ENCODER, dropout=0.5)
    variables = variables_of(model, SPEC)
    network = one(sirens(SIZES, 1), 0)

    @jit
    def run(key):
        groups = ngjax.to_groups(SPEC, network)
        drawn = model.apply(variables, groups, spec=SPEC, train=True, rngs={"dropout": key})
        return drawn.nodes, model.apply(variables, groups, spec=SPEC).nodes

    (a, plain), (b, again), (c, _) = run(jax.random.key(0)), run(jax.random.key(1)), run(jax.random.key(0))
    assert np.array_equal(a, c)
    assert not np.allclose(a, b)
    assert np.array_equal(plain, again)


def refuses(match, run, error=ValueError):
    with pytest.raises(error, match=match):
        jax.eval_shape(run)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((4, 2, 1), "uses 4 input positions, more than max_inputs=3"),
        ((2, 1, 1, 1, 1, 1), "uses 4 hidden positions, more than max_hidden_layers=3"),
        ((2, 2, 3), "uses 3 output positions, more than max_outputs=2"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"positions": "none", "num_probes": 2}])
def test_networks_larger_than_the_tables_are_refused(sizes, match, options):
    spec = siren_spec(sizes)
    model = gnn(encoder=ENCODER.__class__(**{**vars(ENCODER), **options}))
    groups = ngjax.to_groups(spec, one(sirens(sizes, 1), 0))
    refuses(match, lambda: model.init(jax.random.key(0), groups, spec=spec))


def test_other_architectures_and_batch_axes_are_refused():
    model = gnn()
    other = siren_spec((2, 3, 1))
    refuses("of another architecture.*6 nodes", lambda: model.init(jax.random.key(0), graph(), spec=other))
    stacked = ngjax.to_graph(SPEC, sirens(SIZES, 2))
    refuses(r"no batch axes.*\(2, 10, 1\).*batch_graphs", lambda: model.init(jax.random.key(0), stacked))
    groups = ngjax.to_groups(SPEC, one(sirens(SIZES, 1), 0))
    refuses("GroupedGraph with spec=", lambda: model.init(jax.random.key(0), groups), error=TypeError)
    shallow = ENCODER.__class__(**{**vars(ENCODER), "statistics": ngjax.WeightStatistics(*((0.0,) * 2,) * 4)})
    refuses(
        "statistics are for 2 layers, but the network has 3",
        lambda: gnn(encoder=shallow).init(jax.random.key(0), groups, spec=SPEC),
    )


def test_joined_maps_are_one_after_the_other():
    rng = np.random.default_rng(0)
    first, second = (
        LinearMap(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes))
        for shapes in (((3, 4), (4,)), ((4, 5), (5,)))
    )
    x = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)
    expected = second(first(x, jnp.float32), jnp.float32)
    np.testing.assert_allclose(second.after(first)(x, jnp.float32), expected, rtol=1e-4, atol=1e-5)
    assert second.after(None) is second


def test_sums_over_messages_and_nodes_are_in_float32(monkeypatch):
    seen, graph_norm = [], module.graph_norm

    def seeing_aggregate(topology, messages, degree):
        seen.extend(message.dtype for message in messages)
        return aggregate(topology, messages, degree)

    def seeing_norm(topology, nodes, scope):
        seen.append(nodes.dtype)
        return graph_norm(topology, nodes, scope)

    monkeypatch.setattr(module, "aggregate", seeing_aggregate)
    monkeypatch.setattr(module, "graph_norm", seeing_norm)
    groups = ngjax.to_groups(SPEC, one(sirens(SIZES, 1), 0))
    model = NGGNN(features=4, num_layers=2, dtype=jnp.bfloat16)
    jax.eval_shape(lambda: model.init(jax.random.key(0), groups, spec=SPEC))
    assert len(seen) > 2
    assert set(seen) == {jnp.dtype("float32")}
