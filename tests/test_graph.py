import functools
import itertools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from ngjax.actions import fixed, permutation
from ngjax.chains import mlp_spec
from ngjax.graph import (
    flatten_groups,
    group_graph,
    join_nodes,
    kernel_offsets,
    split_nodes,
    to_graph,
    to_groups,
    to_params,
)
from ngjax.infer import infer_spec
from ngjax.spec import (
    ACTIVATIONS,
    EdgeGroup,
    NeuralGraphSpec,
    NodeGroup,
    NodeLayout,
    ParamSpec,
    PathKey,
    param_view,
)

SIZES = (2, 5, 3, 4)


def mlp_params(sizes=SIZES, lead=(), trail=(), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return rng.normal(size=(*lead, *shape, *trail)).astype(dtype)

    return {
        f"layer_{i}": {"kernel": leaf(n_in, n_out), "bias": leaf(n_out)}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


def assert_same(received, expected):
    """Same tree, dtypes, shapes and bits."""
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def round_trip(spec, params, **kwargs):
    return to_params(spec, to_graph(spec, params, **kwargs), **kwargs)


# -- what is where -----------------------------------------------------------------------------------------------------


def test_graph_of_an_mlp():
    spec, params = mlp_spec(SIZES, activation="siren"), mlp_params()
    graph = to_graph(spec, params)
    assert graph.nodes.features.shape == (14, 1)
    biases = [params[f"layer_{i}"]["bias"] for i in range(3)]
    np.testing.assert_array_equal(graph.nodes.features[:, 0], np.concatenate([[0, 0], *biases]))
    np.testing.assert_array_equal(graph.nodes.role, [0] * 2 + [1] * 8 + [2] * 4)
    np.testing.assert_array_equal(graph.nodes.group, [0] * 2 + [1] * 5 + [2] * 3 + [3] * 4)
    np.testing.assert_array_equal(graph.nodes.level, graph.nodes.group)
    np.testing.assert_array_equal(graph.nodes.position, [0, 1] + [0] * 5 + [1] * 3 + [0, 1, 2, 3])
    siren, none = ACTIVATIONS.index("siren"), ACTIVATIONS.index("none")
    np.testing.assert_array_equal(graph.nodes.activation, [none] * 2 + [siren] * 8 + [none] * 4)
    assert graph.nodes.mask.all()
    assert not graph.nodes.graph.any()
    np.testing.assert_array_equal(graph.n_node, [14])
    np.testing.assert_array_equal(graph.n_edge, [2 * 5 + 5 * 3 + 3 * 4])
    np.testing.assert_array_equal(graph.globals.node_index, [np.arange(14)])
    assert graph.globals.loose.shape == (1, 0, 1)
    edges = [
        (start + i, start + n_in + j, params[f"layer_{layer}"]["kernel"][i, j])
        for layer, (n_in, n_out) in enumerate(itertools.pairwise(SIZES))
        for start in [sum(SIZES[:layer])]
        for i in range(n_in)
        for j in range(n_out)
    ]
    senders, receivers, weights = zip(*edges, strict=True)
    np.testing.assert_array_equal(graph.senders, senders)
    np.testing.assert_array_equal(graph.receivers, receivers)
    np.testing.assert_array_equal(graph.edges.features[:, 0, 0], np.array(weights))
    assert graph.edges.mask.shape == (37, 1)
    assert graph.edges.mask.all()


def path(*keys):
    return tuple(PathKey("dict", key) for key in keys)


KERNELS = {"a": (3, 3), "b": (4, 4), "c": (5,), "d": (1, 1)}


@functools.cache
def conv_spec():
    """Four convolutions in a row, with kernels of different size, one of them one-dimensional, and a skip."""
    sizes = (2, 3, 4, 2, 3)
    axes = [fixed(f"n{i}", n, "size") if i in (0, 4) else permutation(f"n{i}", n) for i, n in enumerate(sizes)]
    taps = {n: fixed(f"k{n}", n, "conv") for n in (1, 2, 3, 4, 5)}
    params, edges = [], []
    for i, (name, kernel) in enumerate(KERNELS.items()):
        shape = (*kernel, sizes[i], sizes[i + 1])
        params.append(ParamSpec(path(name), shape, "float32", (*(f"k{k}" for k in kernel), f"n{i}", f"n{i + 1}")))
        rank = len(kernel)
        view = param_view(i, shape, kernel=range(rank), source=(rank,), target=(rank + 1,))
        edges.append(EdgeGroup(name, f"n{i}", f"n{i + 1}", view=view))
    edges.append(EdgeGroup("skip", "n1", "n1", blocks=3, constant=0.5))
    roles = ("input", "hidden", "hidden", "hidden", "output")
    nodes = [NodeGroup(f"n{i}", n, roles[i], i, f"n{i}") for i, n in enumerate(sizes)]
    return NeuralGraphSpec(tuple(params), tuple(nodes), tuple(edges), (*axes, *taps.values()))


def conv_params(lead=(), trail=()):
    rng = np.random.default_rng(0)
    spec = conv_spec()
    leaves = [rng.normal(size=(*lead, *p.shape, *trail)).astype(np.float32) for p in spec.params]
    return spec.unflatten(leaves)


def test_kernels_of_different_size_lie_centred_in_one_grid():
    spec, params = conv_spec(), conv_params()
    assert spec.kernel_grid == (1, 4, 5)
    graph = to_graph(spec, params)
    found = {}
    offsets = np.asarray(graph.edges.offsets).reshape(-1, 3)
    for e in range(spec.num_edges):
        for k in range(20):
            if graph.edges.mask[e, k]:
                ends = (e, int(graph.senders[e]), int(graph.receivers[e]))
                found[*ends, *offsets[k].tolist()] = float(graph.edges.features[e, k, 0])
            else:
                assert graph.edges.features[e, k, 0] == 0
    expected, e = {}, 0
    for group in spec.edge_groups[:-1]:
        kernel = params[group.name]
        kernel = kernel[(None,) * (5 - kernel.ndim)]
        depth, height, width, n_in, n_out = kernel.shape
        for i, j in itertools.product(range(n_in), range(n_out)):
            ends = (e, spec.node_slices[group.source].start + i, spec.node_slices[group.target].start + j)
            for z, y, x in itertools.product(range(depth), range(height), range(width)):
                offset = (z - depth // 2, y - height // 2, x - width // 2)
                expected[*ends, *offset] = float(kernel[z, y, x, i, j])
            e += 1
    for i in range(3):
        node = spec.node_slices["n1"].start + i
        expected[e + i, node, node, 0, 0, 0] = 0.5
    assert found == expected


def test_kernel_offsets_are_from_the_centre():
    offsets = kernel_offsets((1, 2, 3))
    assert offsets.shape == (1, 2, 3, 3)
    np.testing.assert_array_equal(offsets[0, :, 0], [[0, -1, -1], [0, 0, -1]])
    np.testing.assert_array_equal(offsets[0, 1], [[0, 0, -1], [0, 0, 0], [0, 0, 1]])


def test_block_structure_of_edges_against_loops():
    """Grouped and diagonal wiring, and blocks whose neurons do not follow one another."""
    layout = NodeLayout((2, 3, 2), block=(0, 2))
    nodes = (
        NodeGroup("in", 4, "input", 0, "in"),
        NodeGroup("v", 4, "hidden", 1, "v"),
        NodeGroup("att", 12, "hidden", 2, "att"),
        NodeGroup("out", 6, "output", 3, "out"),
    )
    actions = tuple(fixed(g.name, g.size, "test") for g in nodes)
    params = (ParamSpec((), (4,), "float32", ("in",)),)
    edges = (
        EdgeGroup("diagonal", "in", "v", blocks=4, view=param_view(0, (4,), block=(0,))),
        EdgeGroup("grouped", "v", "att", blocks=4, target_layout=layout),
        EdgeGroup("half", "att", "out", blocks=2),
        EdgeGroup("back", "att", "v", blocks=4, source_layout=layout),
    )
    spec = NeuralGraphSpec(params, nodes, edges, actions)
    graph = to_graph(spec, np.arange(1, 5, dtype=np.float32))
    expected = [(i, 4 + i) for i in range(4)]
    expected += [(4 + 2 * h + d, 8 + 6 * h + 2 * r + d) for h in range(2) for d in range(2) for r in range(3)]
    expected += [(8 + 6 * b + i, 20 + 3 * b + o) for b in range(2) for i in range(6) for o in range(3)]
    expected += [(8 + 6 * h + 2 * r + d, 4 + 2 * h + d) for h in range(2) for d in range(2) for r in range(3)]
    assert list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(graph.edges.features[:, 0, 0], [1, 2, 3, 4] + [1] * (len(expected) - 4))
    values = jnp.arange(24.0).reshape(2, 12, 1)
    assert split_nodes(values, 4, layout).shape == (2, 4, 3, 1)
    np.testing.assert_array_equal(join_nodes(split_nodes(values, 4, layout), layout), values)


def test_a_network_of_nodes_alone():
    spec = NeuralGraphSpec(
        (ParamSpec((), (3,), "float32", ("n",)),),
        (NodeGroup("n", 3, "hidden", 1, "n", bias=param_view(0, (3,), target=(0,))),),
        (),
        (permutation("n", 3),),
    )
    bias = np.array([1.0, 2.0, 3.0], np.float32)
    graph = to_graph(spec, bias)
    assert graph.edges.features.shape == (0, 1, 1)
    np.testing.assert_array_equal(to_params(spec, graph), bias)


# -- exact inverses ----------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    lead=st.sampled_from([(), (2,), (3, 1), (1,)]),
    trail=st.sampled_from([(), (2,), (5,)]),
    seed=st.integers(0, 100),
)
def test_round_trips_are_exact_for_any_sizes(sizes, lead, trail, seed):
    spec, params = mlp_spec(sizes), mlp_params(sizes, lead, trail, seed)
    graph = to_graph(spec, params)
    assert graph.nodes.features.size == spec.num_nodes * np.prod(lead + trail, dtype=int)
    assert graph.edges.features.size == spec.num_edges * np.prod(lead + trail, dtype=int)
    assert_same(to_params(spec, graph), params)


@pytest.mark.parametrize(("lead", "trail"), [((), ()), ((3,), ()), ((2, 3), (4,)), ((), (4,))])
def test_round_trips_eager_jit_and_vmap_agree(lead, trail):
    spec, params = mlp_spec(SIZES), mlp_params(SIZES, lead, trail)
    params["layer_1"]["kernel"].flat[:2] = [np.nan, -0.0]
    assert_same(round_trip(spec, params), params)
    assert_same(jax.jit(functools.partial(round_trip, spec))(params), params)
    batched = functools.partial(round_trip, spec)
    for _ in lead:
        batched = jax.vmap(batched)
    assert_same(batched(params), params)
    assert to_graph(spec, params).nodes.features.shape == (*lead, spec.num_nodes, *(trail or (1,)))


def test_round_trips_through_groups_and_the_list_are_the_same():
    spec, params = conv_spec(), conv_params((2,), (3,))
    groups = to_groups(spec, params)
    assert [array.shape for array in groups.edges] == [
        (2, 1, 2, 3, 9, 3),
        (2, 1, 3, 4, 16, 3),
        (2, 1, 4, 2, 5, 3),
        (2, 1, 2, 3, 1, 3),
        (2, 3, 1, 1, 1, 3),
    ]
    assert_same(group_graph(spec, flatten_groups(spec, groups)), groups)
    assert_same(to_params(spec, groups), params)
    assert_same(to_params(spec, to_graph(spec, params)), params)


def test_one_feature_needs_feature_axis():
    spec, params = mlp_spec(SIZES), mlp_params(trail=(1,))
    graph = to_graph(spec, params)
    assert graph.nodes.features.shape == (14, 1)
    assert_same(to_params(spec, graph, feature_axis=True), params)
    assert_same(to_params(spec, graph), jax.tree.map(lambda x: x[..., 0], params))
    with pytest.raises(ValueError, match="feature_axis=False needs a graph with one feature, received 2"):
        to_params(spec, to_graph(spec, mlp_params(trail=(2,))), feature_axis=False)


def test_where_both_readings_fit_it_is_a_batch_unless_told_otherwise():
    spec, params = mlp_spec([3, 3, 3]), mlp_params([3, 3, 3], lead=(3,))
    assert to_graph(spec, params, feature_axis=True).nodes.features.shape == (9, 3)
    graph = to_graph(spec, params)
    assert graph.nodes.features.shape == (3, 9, 1)
    assert_same(to_params(spec, graph), params)
    np.testing.assert_array_equal(graph.nodes.features[:, 3:6, 0], params["layer_0"]["bias"])


def test_a_batch_of_one_of_the_smallest_networks_comes_back():
    params = mlp_params([1, 1], lead=(1,))
    assert_same(round_trip(mlp_spec([1, 1]), params), params)


def test_gradients_pass_through_unchanged():
    spec, params = conv_spec(), conv_params()
    cotangent = jax.tree.map(lambda x: np.cos(x) * 3, params)

    def weighted(p):
        pairs = zip(jax.tree.leaves(round_trip(spec, p)), jax.tree.leaves(cotangent), strict=True)
        return sum((a * b).sum() for a, b in pairs)

    for received, expected in zip(
        jax.tree.leaves(jax.jit(jax.grad(weighted))(params)), jax.tree.leaves(cotangent), strict=True
    ):
        np.testing.assert_array_equal(received, expected)


def test_every_scalar_stands_in_the_graph_once():
    spec, params = mlp_spec(SIZES), mlp_params()

    def half_square(p):
        graph = to_graph(spec, p)
        return sum((array**2).sum() for array in (graph.nodes.features, graph.edges.features)) / 2

    gradient = jax.jit(jax.grad(half_square))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), gradient, params)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_mixed_dtypes_come_back_exactly():
    params = mlp_params()
    params["layer_1"] = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params["layer_1"])
    params["layer_2"]["bias"] = jnp.asarray(params["layer_2"]["bias"], jnp.float16)
    spec = infer_spec(params)
    graph = to_graph(spec, params)
    assert graph.nodes.features.dtype == graph.edges.features.dtype == jnp.float32
    assert_same(to_params(spec, graph), params)
    assert_same(jax.jit(functools.partial(round_trip, spec))(params), params)


def test_one_dtype_comes_back_even_if_the_spec_says_another():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), mlp_params())
    graph = to_graph(mlp_spec(SIZES), params)
    assert graph.edges.features.dtype == jnp.bfloat16
    assert_same(to_params(mlp_spec(SIZES), graph), params)


def test_like_gives_its_dtypes():
    spec, params = mlp_spec(SIZES), mlp_params()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    received = to_params(spec, to_graph(spec, params), like=like)
    assert {leaf.dtype for leaf in jax.tree.leaves(received)} == {jnp.dtype(jnp.bfloat16)}


def test_double_precision():
    params = mlp_params(dtype=np.float64)
    params["layer_0"]["bias"] = params["layer_0"]["bias"].astype(np.float32)
    spec = infer_spec(params)
    with jax.enable_x64(True):
        graph = to_graph(spec, params)
        assert graph.edges.features.dtype == jnp.float64
        assert_same(to_params(spec, graph), params)
    # Without x64 (and with warnings as errors) they are read as float32, as everywhere in JAX.
    received = to_params(spec, to_graph(spec, params), like=params)
    assert_same(received, jax.tree.map(lambda x: x.astype(np.float32), params))
    assert_same(round_trip(spec, params), received)


# -- other trees -------------------------------------------------------------------------------------------------------


class Net(eqx.Module):
    layers: tuple
    steps: jax.Array
    name: str = eqx.field(static=True)


def test_like_rebuilds_classes_and_gives_leaves_without_a_home():
    keys = jax.random.split(jax.random.key(0), 2)
    net = Net(tuple(eqx.nn.Linear(3, 3, key=k) for k in keys), jnp.arange(3), "net")
    spec = infer_spec(net)
    graph = to_graph(spec, net)
    for known in (spec, NeuralGraphSpec.from_json(spec.to_json())):
        received = to_params(known, graph, like=net)
        assert isinstance(received, Net)
        assert received.name == "net"
        assert_same(received, net)
    assert_same(jax.jit(lambda n: to_params(spec, to_graph(spec, n), like=n))(net), net)
    with pytest.raises(ValueError, match="steps is int32 and has no home in the graph: pass like="):
        to_params(spec, graph)


@pytest.mark.parametrize("wrap", [freeze, nnx.State, lambda p: {"params": p}, lambda p: [p["layer_0"], p["layer_1"]]])
def test_trees_of_other_classes(wrap):
    params = wrap(mlp_params([2, 3, 2]))
    spec = infer_spec(params)
    assert_same(round_trip(spec, params), params)
    # What has no treedef any more is rebuilt of dicts and lists, with the same leaves; `like` says the class.
    read = NeuralGraphSpec.from_json(spec.to_json())
    assert_same(to_params(read, to_graph(read, params), like=params), params)


def test_frozen_and_plain_dicts_are_the_same_architecture():
    params = mlp_params([2, 3, 2])
    spec = infer_spec(params)
    frozen = freeze(params)
    assert infer_spec(frozen) == spec
    graph = to_graph(spec, frozen)
    assert isinstance(to_params(spec, graph), dict)
    assert isinstance(to_params(spec, graph, like=frozen), FrozenDict)


# -- compiling once ----------------------------------------------------------------------------------------------------


def test_a_spec_compiles_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def scaled(spec, params):
        traces.append(spec)
        graph = to_graph(spec, params)
        return to_params(spec, graph)

    scaled(mlp_spec(SIZES), mlp_params())
    scaled(mlp_spec(SIZES), mlp_params(seed=1))
    scaled(infer_spec(mlp_params()), mlp_params(seed=2))
    scaled(NeuralGraphSpec.from_json(mlp_spec(SIZES).to_json()), mlp_params(seed=3))
    assert len(traces) == 1
    scaled(mlp_spec(SIZES, activation="tanh"), mlp_params())
    assert len(traces) == 2


def test_calls_outside_of_jit_compile_once(caplog):
    def compiled():
        names = [r.message.split()[1] for r in caplog.records if r.message.startswith("Compiling")]
        return [name.removeprefix("jit(").removesuffix(")") for name in names]

    sizes = (2, 7, 6)
    with jax.log_compiles():
        round_trip(mlp_spec(sizes), mlp_params(sizes))
        first = compiled()
        round_trip(mlp_spec(sizes), mlp_params(sizes, seed=1))
    assert first == ["_read_groups", "flatten_groups", "group_graph", "_write_leaves"]
    assert compiled() == first


# -- bad input ---------------------------------------------------------------------------------------------------------


def replaced(leaf):
    params = mlp_params()
    params["layer_1"]["kernel"] = leaf
    return params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layer_0": mlp_params()["layer_0"]}, r"layer_1/bias \(3,\) of the spec is missing.*another architecture"),
        (mlp_params((2, 5, 3, 4, 4)), r"layer_3/bias is not part of the spec"),
        (mlp_params((2, 6, 3, 4)), r"layer_0/bias: expected shape \(5,\).*received \(6,\)"),
        (replaced(np.ones((3, 5), np.float32)), r"layer_1/kernel: expected shape \(5, 3\).*received \(3, 5\)"),
        (replaced(np.ones(5, np.float32)), r"layer_1/kernel: expected shape \(5, 3\).*received \(5,\)"),
        (replaced(np.ones((7, 5, 3), np.float32)), r"do not share the same batch axes.*layer_1/kernel.*\(7, 5, 3\)"),
        (replaced(np.ones((5, 3, 7), np.float32)), r"do not share the same batch axes"),
        ([], r"layer_0/bias \(5,\) of the spec is missing"),
    ],
)
def test_leaves_of_another_architecture_are_refused_by_name(params, message):
    with pytest.raises(ValueError, match=message):
        to_graph(mlp_spec(SIZES), params)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((5, 3), np.complex64), r"layer_1/kernel: expected a floating array, received complex64"),
        (np.ones((5, 3), np.int32), r"layer_1/kernel: expected a floating array, received int32"),
        (1.0, r"layer_1/kernel: expected an array, received float"),
    ],
)
def test_leaves_that_are_no_floating_arrays_are_refused_by_name(leaf, message):
    with pytest.raises(TypeError, match=message):
        to_graph(mlp_spec(SIZES), replaced(leaf))


def test_feature_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"layer_0/bias|do not share"):
        to_graph(mlp_spec(SIZES), mlp_params(), feature_axis=True)


def test_graphs_of_another_architecture_are_refused():
    graph = to_graph(mlp_spec(SIZES), mlp_params())
    with pytest.raises(ValueError, match=r"another architecture.*expected 15 nodes.*received 14 nodes"):
        to_params(mlp_spec((2, 5, 4, 4)), graph)
    with pytest.raises(ValueError, match=r"another architecture.*37 edges|another architecture"):
        to_params(conv_spec(), graph)
    groups = to_groups(mlp_spec(SIZES), mlp_params())
    with pytest.raises(ValueError, match=r"another architecture.*\(1, 2, 5, 1\)"):
        to_params(mlp_spec((2, 3, 5, 4)), groups)
