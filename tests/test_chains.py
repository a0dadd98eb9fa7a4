import functools
import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from ngjax.chains import infer_spec, mlp_spec
from ngjax.graph import to_graph, to_params
from ngjax.spec import NeuralGraphSpec, format_path

SIZES = (3, 5, 4, 2)


def dense(sizes=SIZES, *, kernel="kernel", bias="bias", transpose=False, names=None):
    """A tree `{name: {kernel, bias}}` of a chain, numbered weights so that no two are equal."""
    names = names or [f"layer_{i}" for i in range(len(sizes) - 1)]
    tree, start = {}, 1
    for name, (n_in, n_out) in zip(names, itertools.pairwise(sizes), strict=True):
        weights = np.arange(start, start + n_in * n_out, dtype=np.float32).reshape(n_in, n_out)
        start += n_in * n_out
        tree[name] = {kernel: weights.T if transpose else weights}
        if bias is not None:
            tree[name][bias] = np.arange(start, start + n_out, dtype=np.float32)
            start += n_out
    return tree


def torch_flat():
    tree = dense(kernel="weight", transpose=True, names=["net.0", "net.2", "net.4"])
    return {f"{name}.{leaf}": array for name, layer in tree.items() for leaf, array in layer.items()}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in SIZES[1:-1]:
            x = nn.relu(nn.Dense(n)(x))
        return nn.Dense(SIZES[-1])(x)


@functools.cache
def linen_params():
    return jax.jit(Linen().init)(jax.random.key(0), np.zeros((1, SIZES[0]), np.float32))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(n_in, n_out, rngs=rngs) for n_in, n_out in itertools.pairwise(SIZES)])


def haiku_params():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(SIZES[1:])(x)))
    return jax.jit(network.init)(jax.random.key(0), np.zeros((1, SIZES[0]), np.float32))


def equinox_params():
    class Net(eqx.Module):
        layers: list
        activation: object

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.layers = [eqx.nn.Linear(a, b, key=k) for a, b, k in zip(SIZES, SIZES[1:], keys, strict=False)]
            self.activation = jax.nn.relu

    return eqx.filter(Net(), eqx.is_inexact_array)


NAMINGS = {
    "own": dense,
    "linen": lambda: linen_params()["params"],
    "linen with params": lambda: linen_params(),
    "linen frozen": lambda: freeze(linen_params()),
    "nnx state": lambda: nnx.state(Nnx(), nnx.Param),
    "nnx pure dict": lambda: nnx.to_pure_dict(nnx.state(Nnx())),
    "haiku": haiku_params,
    "equinox": equinox_params,
    "torch flat": torch_flat,
    "torch nested": lambda: {
        "net": dense(kernel="weight", transpose=True, names=["0", "2", "4"]),
    },
    "slashes": lambda: {f"{name}/{leaf}": array for name, layer in dense().items() for leaf, array in layer.items()},
    "list": lambda: list(dense().values()),
    "bare kernel": lambda: {"kernel": np.ones((3, 2), np.float32)},
}


def shapes_by_layer(spec):
    return [(spec.node_group[group.source].size, spec.node_group[group.target].size) for group in spec.edge_groups]


# -- mlp_spec ----------------------------------------------------------------------------------------------------------


def test_mlp_spec_describes_the_layers():
    spec = mlp_spec(SIZES, activation="siren")
    assert [(g.name, g.size, g.role, g.level, g.activation, g.slots) for g in spec.node_groups] == [
        ("input", 3, "input", 0, "none", 3),
        ("hidden_1", 5, "hidden", 1, "siren", 1),
        ("hidden_2", 4, "hidden", 2, "siren", 1),
        ("output", 2, "output", 3, "none", 2),
    ]
    assert [(g.name, g.source, g.target, g.blocks) for g in spec.edge_groups] == [
        ("layer_0/kernel", "input", "hidden_1", 1),
        ("layer_1/kernel", "hidden_1", "hidden_2", 1),
        ("layer_2/kernel", "hidden_2", "output", 1),
    ]
    assert spec.num_nodes == 14
    assert spec.num_edges == 15 + 20 + 8
    assert spec.max_level == 3
    assert [spec.num_positions(role) for role in ("input", "hidden", "output")] == [3, 2, 2]
    assert spec.symmetry == {
        "layer_0": {"bias": ("hidden_1",), "kernel": (None, "hidden_1")},
        "layer_1": {"bias": ("hidden_2",), "kernel": ("hidden_1", "hidden_2")},
        "layer_2": {"bias": (None,), "kernel": ("hidden_2", None)},
    }
    assert [(p.id, p.reason, p.axes) for p in spec.pinned] == [
        ("input", "input", (("layer_0/kernel", 0),)),
        ("output", "output", (("layer_2/bias", 0), ("layer_2/kernel", 1))),
    ]


def test_mlp_spec_is_that_of_the_parameters_it_names():
    spec = mlp_spec(SIZES, activation="tanh")
    assert infer_spec(dense(), activation="tanh") == spec
    assert hash(infer_spec(dense(), activation="tanh")) == hash(spec)
    assert jax.tree.structure(spec.unflatten(spec.flatten(dense()))) == jax.tree.structure(dense())


def test_mlp_spec_of_one_layer_has_no_symmetry():
    spec = mlp_spec([4, 3])
    assert [g.role for g in spec.node_groups] == ["input", "output"]
    assert not any(spec.is_free(action.id) for action in spec.actions)


def test_mlp_spec_has_more_than_ten_layers_in_order():
    sizes = list(range(3, 16))
    spec = mlp_spec(sizes)
    assert shapes_by_layer(spec) == list(itertools.pairwise(sizes))
    params = dense(sizes)
    names = [format_path(spec.params[group.view.param].path) for group in spec.edge_groups]
    assert names == [f"layer_{i}/kernel" for i in range(12)]
    assert [param.shape for param in spec.params] == [leaf.shape for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([], "at least two sizes"), ([3], "at least two sizes"), ([3, 0, 2], "all positive"), ([3, -1], "all positive")],
)
def test_mlp_spec_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        mlp_spec(sizes)


def test_mlp_spec_refuses_a_size_that_is_no_integer():
    with pytest.raises(TypeError):
        mlp_spec([np.float32(2.5), 3])


def test_mlp_spec_refuses_an_unknown_activation_and_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown activation 'rleu'.*relu.*siren"):
        mlp_spec([2, 3, 1], activation="rleu")


def test_mlp_spec_takes_sizes_of_numpy_and_a_dtype():
    spec = mlp_spec(np.array([2, 3, 1]), dtype=jnp.bfloat16)
    assert {param.dtype for param in spec.params} == {"bfloat16"}
    assert NeuralGraphSpec.from_json(spec.to_json()) == spec


# -- infer_spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", list(NAMINGS))
def test_infer_spec_reads_the_naming(naming):
    params = NAMINGS[naming]()
    spec = infer_spec(params, activation="tanh")
    if naming == "bare kernel":
        assert shapes_by_layer(spec) == [(3, 2)]
        return
    assert shapes_by_layer(spec) == list(itertools.pairwise(SIZES))
    assert [group.activation for group in spec.node_groups] == ["none", "tanh", "tanh", "none"]
    assert all(group.bias is not None for group in spec.node_groups[1:])
    names = [group.name for group in spec.edge_groups]
    assert names == sorted(names)
    torch_layout = naming in ("equinox", "torch flat", "torch nested")
    for group, nodes in zip(spec.edge_groups, spec.node_groups[1:], strict=True):
        assert format_path(spec.params[group.view.param].path) == group.name
        assert (group.view.source, group.view.target) == (((1,), (0,)) if torch_layout else ((0,), (1,)))
        bias = format_path(spec.params[nodes.bias.param].path)
        stem = group.name.removesuffix("/value")
        for kernel in ("kernel", "weight", "w"):
            stem = stem.removesuffix(kernel)
        assert bias.startswith(stem)
        assert bias.removeprefix(stem) in ("bias", "b", "bias/value")


@pytest.mark.parametrize("naming", ["linen frozen", "nnx state", "equinox", "torch flat"])
def test_the_graph_of_an_inferred_spec_has_the_weights_and_gives_them_back(naming):
    params = NAMINGS[naming]()
    spec = infer_spec(params)
    graph = to_graph(spec, params)
    leaves = jax.tree.leaves(params)
    expected = [np.asarray(leaves[group.view.param]) for group in spec.edge_groups]
    expected = [kernel.T if naming in ("equinox", "torch flat") else kernel for kernel in expected]
    np.testing.assert_array_equal(graph.edges.features[:, 0, 0], np.concatenate([k.ravel() for k in expected]))
    biases = [np.asarray(leaves[group.bias.param]) for group in spec.node_groups[1:]]
    np.testing.assert_array_equal(graph.nodes.features[:, 0], np.concatenate([np.zeros(3), *biases]))
    read = NeuralGraphSpec.from_json(spec.to_json())
    for received in (to_params(spec, graph), to_params(read, graph, like=params)):
        assert jax.tree.structure(received) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, received, params)
    if naming in ("nnx state", "equinox"):
        with pytest.raises(ValueError, match="only its own class can rebuild"):
            to_params(read, graph)


def test_infer_spec_reads_layers_in_natural_order():
    sizes = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    names = [f"Dense_{i}" for i in range(11)]
    assert sorted(names) != names
    spec = infer_spec(dense(sizes, names=names))
    assert [group.name for group in spec.edge_groups] == [f"{name}/kernel" for name in names]
    names = ["linear", *(f"linear_{i}" for i in range(1, 11))]
    spec = infer_spec(dense(sizes, kernel="w", bias="b", names=names))
    assert [group.name for group in spec.edge_groups] == [f"{name}/w" for name in names]
    assert [g.size for g in spec.node_groups] == sizes


def test_infer_spec_reads_a_chain_without_some_biases():
    params = dense()
    del params["layer_1"]["bias"]
    spec = infer_spec(params)
    assert [group.bias is None for group in spec.node_groups] == [True, False, True, False]
    graph = to_graph(spec, params)
    np.testing.assert_array_equal(graph.nodes.features[spec.node_slices["hidden_2"]], 0)
    jax.tree.map(np.testing.assert_array_equal, to_params(spec, graph), params)
    assert all(g.bias is None for g in infer_spec(dense(bias=None)).node_groups)


def test_infer_spec_reads_abstract_leaves_and_dtypes():
    params = dense()
    params["layer_1"] = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params["layer_1"])
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    spec = infer_spec(abstract)
    assert spec == infer_spec(params)
    assert [p.dtype for p in spec.params] == ["float32", "float32", "bfloat16", "bfloat16", "float32", "float32"]


def test_infer_spec_leaves_integers_and_keys_without_a_home():
    params = dense() | {"step": np.int32(7), "rng": jax.random.key(0), "mask": np.array([True])}
    spec = infer_spec(params)
    assert spec.num_edges == mlp_spec(SIZES).num_edges
    homeless = [(format_path(p.path), p.dtype) for p in spec.params if not p.is_floating]
    assert homeless == [("mask", "bool"), ("rng", "key<fry>"), ("step", "int32")]
    assert NeuralGraphSpec.from_json(spec.to_json()) == spec
    received = to_params(spec, to_graph(spec, params), like=params)
    assert received["step"] == 7
    assert received["rng"] is params["rng"]
    with pytest.raises(ValueError, match=r"mask is bool and has no home in the graph: pass like="):
        to_params(spec, to_graph(spec, params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"layer_1": {"kernel": np.ones((6, 4), np.float32)}},
            r"layer_0/kernel has 5 outputs.*layer_1/ke.*6 in",
        ),
        (lambda p: p | {"layer_3": {"bias": np.ones(2, np.float32)}}, r"layer_3 has a bias but no kernel"),
        (
            lambda p: p | {"layer_3": {"kernel": np.ones((2, 4), np.float32), "bias": np.ones(3, np.float32)}},
            r"layer_3.*4 outputs, but the bias has 3",
        ),
        (
            lambda p: p | {"conv": {"kernel": np.ones((3, 3, 1, 8), np.float32)}},
            r"conv/kernel \(3, 3, 1, 8\) is not.*trace",
        ),
        (lambda p: p | {"norm": {"scale": np.ones(5, np.float32)}}, r"norm/scale \(5,\) is not the kernel or bias"),
        (lambda p: p | {"temperature": np.float32(1.0)}, r"temperature \(\) is not"),
        (lambda p: p | {"layer_3": {"bias": np.ones((1, 2), np.float32)}}, r"layer_3/bias \(1, 2\) is not"),
        (
            lambda p: p | {"layer_3": {"w": np.ones((2, 2), np.float32), "weight": np.ones((2, 2), np.float32)}},
            r"layer_3/w and layer_3/weight would both be the kernel",
        ),
    ],
)
def test_infer_spec_refuses_what_is_no_chain_and_names_the_leaf(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        infer_spec(change(dense()))
    assert "mlp_spec" in str(raised.value)
    assert "trace_spec" in str(raised.value)


@pytest.mark.parametrize("empty", [{}, [], {"step": np.int32(1)}, None])
def test_infer_spec_refuses_a_tree_without_kernels(empty):
    with pytest.raises(ValueError, match="at least one kernel"):
        infer_spec(empty)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((2, 2), np.complex64), r"layer_3/kernel is complex64.*real and imaginary"),
        (1.5, r"layer_3/kernel: expected an array, received float"),
        ("relu", r"layer_3/kernel: expected an array, received str"),
    ],
)
def test_infer_spec_refuses_leaves_that_are_no_real_arrays(leaf, message):
    with pytest.raises(TypeError, match=message):
        infer_spec(dense() | {"layer_3": {"kernel": leaf}})


def test_infer_spec_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'Relu'"):
        infer_spec(dense(), activation="Relu")
