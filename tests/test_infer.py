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

import ngjax
from ngjax.actions import index_array
from ngjax.chains import cnn_spec, mlp_spec
from ngjax.graph import to_graph, to_params
from ngjax.infer import infer_spec
from ngjax.spec import NeuralGraphSpec, format_path, pad_kernel_shape
from ngjax.trace import trace_spec

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


def test_infer_spec_of_the_parameters_that_mlp_spec_names_is_mlp_spec():
    spec = mlp_spec(SIZES, activation="tanh")
    assert infer_spec(dense(), activation="tanh") == spec
    assert hash(infer_spec(dense(), activation="tanh")) == hash(spec)
    assert jax.tree.structure(spec.unflatten(spec.flatten(dense()))) == jax.tree.structure(dense())


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
            r"conv/kernel has 8 outputs, but layer_0/kernel has 3 inputs, which is no multiple.*trace",
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


# -- agreement with the trace ------------------------------------------------------------------------------------------


def corresponding(spec, other):
    """From each free permutation of one spec to that of the other which stands on the same axes."""
    found = {}
    for ours, theirs in zip(spec.params, other.params, strict=True):
        assert (ours.path, ours.shape, ours.dtype) == (theirs.path, theirs.shape, theirs.dtype)
        assert [spec.is_free(id) for id in ours.axes] == [other.is_free(id) for id in theirs.axes], ours.path
        for a, b in zip(ours.axes, theirs.axes, strict=True):
            if spec.action[a].kind == "permutation":
                assert found.setdefault(a, b) == b
    assert len(set(found.values())) == len(found)
    for item in (spec, other):
        assert sum(action.kind == "permutation" for action in item.actions) == len(found)
    return found


def permuted(spec, perms, params):
    """Like `permute_params`, without a program for each spec: nothing here depends on the place along another axis."""
    moved = []
    for param, leaf in zip(spec.params, spec.flatten(params), strict=True):
        places = [index_array(spec.action, perms, id) for id in param.axes]
        moved.append(np.asarray(leaf)[np.ix_(*places)])
    return moved


def assert_same_graph(spec, other, params):
    """Same neurons, same homes, same symmetry: everything but names."""
    ids, rng = corresponding(spec, other), np.random.default_rng(0)
    perms = {id: rng.permutation(spec.action[id].size) for id in ids}
    ours = permuted(spec, perms, params)
    theirs = permuted(other, {ids[id]: perm for id, perm in perms.items()}, params)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    fields = ("size", "role", "level", "activation", "slots")
    for a, b in zip(spec.node_groups, other.node_groups, strict=True):
        assert [getattr(a, name) for name in fields] == [getattr(b, name) for name in fields]
    for a, b in zip(spec.edge_groups, other.edge_groups, strict=True):
        assert pad_kernel_shape(a.kernel_shape) == pad_kernel_shape(b.kernel_shape)
        assert (spec.node_slices[a.source], spec.node_slices[a.target]) == (
            other.node_slices[b.source],
            other.node_slices[b.target],
        )
    ours, theirs = ngjax.to_groups(spec, params), ngjax.to_groups(other, params)
    np.testing.assert_array_equal(ours.nodes, theirs.nodes)
    for a, b in zip(ours.edges, theirs.edges, strict=True):
        np.testing.assert_array_equal(np.ravel(a), np.ravel(b))


def numbered(shapes):
    """Weights of these shapes, no two of them equal."""
    leaves, treedef = jax.tree.flatten(shapes)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    arrays = [
        np.arange(start, start + leaf.size, dtype=np.float32).reshape(leaf.shape)
        for start, leaf in zip(starts, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, arrays)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolve(x, kernel, layout):
    axes = "DHW"[3 - (x.ndim - 2) :]
    space = f"N{axes}C" if layout == "channels last" else f"NC{axes}"
    kernels = f"{axes}IO" if layout == "channels last" else f"OI{axes}"
    return jax.lax.conv_general_dilated(x, kernel, (1,) * len(axes), "SAME", dimension_numbers=(space, kernels, space))


def plain_chain(names, *, layout="channels last", pooled=False, leaves=("kernel", "bias")):
    """The function of a chain with flat or nested names: relu, and a flatten in front of the first dense layer."""
    kernel_name, bias_name = leaves

    def apply(params, x):
        for i, name in enumerate(names):
            layer = params[name] if name in params else {leaf: params.get(f"{name}.{leaf}") for leaf in leaves}
            kernel, bias = layer[kernel_name], layer.get(bias_name)
            if kernel.ndim == 2 and x.ndim > 2:
                spatial = tuple(range(1, x.ndim - 1)) if layout == "channels last" else tuple(range(2, x.ndim))
                x = x.mean(spatial) if pooled else x.reshape(x.shape[0], -1)
            if kernel.ndim > 2:
                x = convolve(x, kernel, layout)
                bias = None if bias is None else bias.reshape(-1, *[1] * (x.ndim - 2) * (layout == "channels first"))
            else:
                x = x @ (kernel if layout == "channels last" else kernel.T)
            x = x if bias is None else x + bias
            x = x if i == len(names) - 1 else jax.nn.relu(x)
        return x

    return apply


def plain_params(names, shapes, *, leaves=("kernel", "bias"), bias=True, flat=False):
    kernel_name, bias_name = leaves
    out = (lambda s: s[0]) if kernel_name == "weight" else (lambda s: s[-1])
    layers = {
        name: {kernel_name: shape(*sizes)} | ({bias_name: shape(out(sizes))} if bias else {})
        for name, sizes in zip(names, shapes, strict=True)
    }
    if flat:
        return {f"{name}.{leaf}": array for name, layer in layers.items() for leaf, array in layer.items()}
    return layers


def linen_case(module, *inputs):
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), *inputs), inputs


class LinenMLP(nn.Module):
    sizes: tuple
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for n in self.sizes[:-1]:
            x = nn.relu(nn.Dense(n, use_bias=self.use_bias)(x))
        return nn.Dense(self.sizes[-1], use_bias=self.use_bias)(x)


class LinenCNN(nn.Module):
    channels: tuple
    dense: tuple
    kernel: tuple = (3, 3)
    pooled: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for n in self.channels:
            x = nn.relu(nn.Conv(n, self.kernel, use_bias=self.use_bias)(x))
        x = x.mean(tuple(range(1, x.ndim - 1))) if self.pooled else x.reshape(x.shape[0], -1)
        return LinenMLP(self.dense, name="head")(x)


def nnx_case(make, x):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda params, x: nnx.merge(graph, params)(x), state, (x,)


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (2, 2), rngs=rngs)
        self.linear1 = nnx.Linear(4 * 6, 5, rngs=rngs)
        self.linear2 = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise((3, 4, 4, 4, 2))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def haiku_case(function, x):
    network = hk.without_apply_rng(hk.transform(function))
    return network.apply, jax.eval_shape(network.init, jax.random.key(0), x), (x,)


def haiku_cnn(x, data_format="NHWC"):
    for n in (3, 4):
        x = jax.nn.relu(hk.Conv2D(n, 3, data_format=data_format)(x))
    x = jax.nn.relu(hk.Linear(5)(hk.Flatten()(x)))
    return hk.Linear(2)(x)


def equinox_case(make, x):
    arrays, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), arrays, (x,)


def equinox_cnn(key):
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 3, 3, key=key),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(3, 4, 2, key=key),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(4 * 6, 5, key=key),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(5, 2, key=key),
        ]
    )


def plain_case(names, shapes, x, *, leaves=("kernel", "bias"), bias=True, flat=False, **kwargs):
    layout = "channels first" if leaves[0] == "weight" else "channels last"
    params = plain_params(names, shapes, leaves=leaves, bias=bias, flat=flat)
    return plain_chain(names, layout=layout, leaves=leaves, **kwargs), params, (x,)


def pairs(sizes, out_first=False):
    """Shapes of matrix and bias of each layer."""
    return [(shape(*(a, b)[:: -1 if out_first else 1]), shape(b)) for a, b in itertools.pairwise(sizes)]


def dicts(layers, kernel="W", bias="b"):
    return [{kernel: matrix, bias: vector} for matrix, vector in layers]


def flat(layers, kernel="W", bias="b", start=0):
    return {
        f"{name}{i}": leaf
        for i, layer in enumerate(layers, start)
        for name, leaf in zip((kernel, bias), layer, strict=True)
    }


def plain_arrays_case(layers, params, *, out_first=False):
    """The MLP of these layers, whose arrays stand in `params` in any form."""
    places = jax.tree.leaves(params)
    order = [[next(i for i, leaf in enumerate(places) if leaf is part) for part in layer] for layer in layers]

    def apply(params, x):
        leaves = jax.tree.leaves(params)
        for number, (kernel, *bias) in enumerate(order):
            x = x @ (leaves[kernel].T if out_first else leaves[kernel]) + sum(leaves[i] for i in bias)
            x = x if number == len(order) - 1 else jax.nn.relu(x)
        return x

    return apply, params, (shape(6, layers[0][0].shape[1 if out_first else 0]),)


def plain_forms():
    small, long, turned = pairs((3, 4, 4, 2)), pairs((4, *[3] * 11, 2)), pairs((3, 3, 2), out_first=True)
    no_last = [*small[:-1], small[-1][:1]]
    return {
        "list of pairs": (small, small),
        "list of pairs, 12 layers": (long, long),
        "list of pairs and nothing": (small, [small[0], (), small[1], (), small[2], ()]),
        "list of pairs in a dict": (small, {"layers": small}),
        "list of pairs, one layer": (small[:1], small[:1]),
        "list of pairs, the last bias missing": (no_last, no_last),
        "list of pairs, [out, in]": (turned, turned, True),
        "list of dicts": (small, dicts(small)),
        "list of dicts, w": (small, dicts(small, "w")),
        "list of dicts, w, [out, in]": (turned, dicts(turned, "w"), True),
        "list of dicts, weights": (small, dicts(small, "weights", "biases")),
        "numbered": (long, flat(long)),
        "numbered from 1": (small, flat(small, "w", "b", 1)),
        "numbered with underscores": (small, flat(small, "kernel_", "bias_")),
        "numbered, [out, in]": (turned, flat(turned, "weight"), True),
    }


@pytest.mark.parametrize("form", plain_forms())
def test_infer_spec_reads_plain_pytrees(form):
    layers, params, *out_first = plain_forms()[form]
    apply, shapes, inputs = plain_arrays_case(layers, params, out_first=bool(out_first))
    params = numbered(shapes)
    assert_same_graph(infer_spec(params, activation="relu"), trace_spec(apply, params, *inputs), params)


TORCH = ("weight", "bias")
DEEP = [f"Dense_{i}" for i in range(12)]
CASES = {
    "Linen MLP": lambda: linen_case(LinenMLP((4, 5, 2)), shape(6, 3)),
    "Linen MLP, equal widths": lambda: linen_case(LinenMLP((4, 4, 4, 4)), shape(6, 4)),
    "Linen MLP, no biases": lambda: linen_case(LinenMLP((4, 4, 2), use_bias=False), shape(6, 3)),
    "Linen MLP, width 1": lambda: linen_case(LinenMLP((1, 4, 1, 1)), shape(6, 2)),
    "Linen MLP, one layer": lambda: linen_case(LinenMLP((4,)), shape(6, 3)),
    "Linen MLP, 12 layers": lambda: linen_case(LinenMLP((3,) * 11 + (2,)), shape(6, 4)),
    "NNX MLP": lambda: nnx_case(NnxMLP, shape(6, 3)),
    "Haiku MLP": lambda: haiku_case(lambda x: hk.nets.MLP((4, 4, 2))(x), shape(6, 3)),
    "Haiku MLP, 12 layers, no biases": lambda: haiku_case(
        lambda x: hk.nets.MLP((3,) * 11 + (2,), with_bias=False)(x), shape(6, 4)
    ),
    "Equinox MLP": lambda: equinox_case(lambda key: eqx.nn.MLP(3, 2, 4, 2, key=key), shape(6, 3)),
    "Equinox MLP, no biases": lambda: equinox_case(
        lambda key: eqx.nn.MLP(3, 1, 1, 3, use_bias=False, use_final_bias=False, key=key), shape(6, 3)
    ),
    "plain MLP, unlike names": lambda: plain_case(["first", "last"], [(3, 4), (4, 2)], shape(6, 3)),
    "plain MLP, 12 layers": lambda: plain_case(DEEP, [(4, 3)] + [(3, 3)] * 10 + [(3, 2)], shape(6, 4)),
    "PyTorch MLP": lambda: plain_case(
        ["net.0", "net.2", "net.10"], [(4, 3), (4, 4), (2, 4)], shape(6, 3), leaves=TORCH, flat=True
    ),
    "Linen CNN": lambda: linen_case(LinenCNN((3, 4), (5, 2)), shape(6, 2, 3, 1)),
    "Linen CNN, pooled": lambda: linen_case(LinenCNN((3, 4), (5, 2), pooled=True), shape(6, 2, 3, 1)),
    "Linen CNN, no biases": lambda: linen_case(LinenCNN((3, 4), (5, 2), use_bias=False), shape(6, 2, 3, 1)),
    "Linen CNN, 1D": lambda: linen_case(LinenCNN((3, 4), (5, 2), kernel=(3,)), shape(6, 7, 1)),
    "Linen CNN, 3D": lambda: linen_case(LinenCNN((3, 4), (2,), kernel=(1, 2, 3)), shape(2, 2, 2, 3, 2)),
    "Linen CNN, one channel": lambda: linen_case(LinenCNN((3, 1, 4), (5,), kernel=(1, 1)), shape(6, 2, 3, 2)),
    "NNX CNN": lambda: nnx_case(NnxCNN, shape(6, 2, 3, 1)),
    "Haiku CNN": lambda: haiku_case(haiku_cnn, shape(6, 2, 3, 1)),
    "Haiku CNN, channels first": lambda: haiku_case(
        functools.partial(haiku_cnn, data_format="NCHW"), shape(6, 1, 2, 3)
    ),
    "Equinox CNN": lambda: equinox_case(equinox_cnn, shape(6, 1, 5, 6)),
    "plain CNN without dense layers": lambda: plain_case(
        ["layer_0", "layer_1"], [(3, 3, 2, 4), (2, 2, 4, 3)], shape(6, 4, 4, 2)
    ),
    "PyTorch CNN": lambda: plain_case(
        ["features.0", "features.3", "classifier.1", "classifier.4"],
        [(4, 1, 3, 3), (4, 4, 3, 3), (5, 24), (2, 5)],
        shape(6, 1, 2, 3),
        leaves=TORCH,
        flat=True,
    ),
    "PyTorch CNN, pooled, no biases": lambda: plain_case(
        ["conv1", "conv2", "fc"],
        [(4, 1, 3, 3), (4, 4, 3, 3), (2, 4)],
        shape(6, 1, 2, 3),
        leaves=TORCH,
        bias=False,
        pooled=True,
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_infer_spec_agrees_with_the_trace(case):
    apply, shapes, inputs = CASES[case]()
    params = numbered(shapes)
    assert_same_graph(infer_spec(params, activation="relu"), trace_spec(apply, params, *inputs), params)


@pytest.mark.parametrize(
    ("spec", "inputs", "pooled"),
    [
        (cnn_spec((2, 4, 5), kernel_size=(3, 3), dense=(6, 3), positions=12), (1, 3, 4, 2), False),
        (cnn_spec((2, 4, 5), kernel_size=[(3, 3), (1, 2)], dense=(6, 3)), (1, 3, 4, 2), True),
        (cnn_spec((1, 4), kernel_size=(3,), dense=(3,), positions=5), (1, 5, 1), False),
        (cnn_spec((1, 4, 1), kernel_size=(2, 2, 2)), (1, 2, 3, 4, 1), False),
        (mlp_spec((3, 4, 1, 4, 2)), (1, 3), False),
    ],
)
def test_described_specs_agree_with_the_trace(spec, inputs, pooled):
    names = [f"layer_{i}" for i in range(len(spec.edge_groups))]
    params = numbered(spec.unflatten([shape(*param.shape) for param in spec.params]))
    assert infer_spec(params) == spec
    assert_same_graph(spec, trace_spec(plain_chain(names, pooled=pooled), params, shape(*inputs)), params)


def test_a_model_reads_the_same_with_the_inferred_and_the_traced_spec():
    apply, shapes, inputs = CASES["Equinox CNN"]()
    params = jax.tree.map(lambda leaf: np.sin(leaf), numbered(shapes))
    specs = infer_spec(params), trace_spec(apply, params, *inputs)
    graphs = [to_graph(spec, params) for spec in specs]
    assert jax.tree.structure(graphs[0]) == jax.tree.structure(graphs[1])
    jax.tree.map(np.testing.assert_array_equal, *graphs)
    model = ngjax.WeightSpaceModel(ngjax.NGGNN(features=8, num_layers=2), ngjax.GraphReadout(features=3))
    variables = jax.jit(model.init, static_argnames="spec")(
        jax.random.key(1), ngjax.to_groups(specs[0], params), spec=specs[0]
    )
    run = jax.jit(model.apply, static_argnames="spec")
    first, second = (run(variables, ngjax.to_groups(spec, params), spec=spec) for spec in specs)
    assert np.ptp(first) > 0
    np.testing.assert_array_equal(first, second)


# -- what names and shapes do not tell ---------------------------------------------------------------------------------


def layers(kernel="kernel", bias=True, /, **shapes):
    return plain_params(list(shapes), list(shapes.values()), leaves=(kernel, "bias"), bias=bias)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        # An autoencoder runs either way, and so do blocks whose layers have equal widths.
        (layers(encoder=(8, 3), decoder=(3, 8)), r"whether decoder/kernel \(3, 8\) or encoder/kernel \(8, 3\) comes"),
        (layers(a_0=(8, 4), a_1=(4, 2), b_0=(2, 4), b_1=(4, 8)), r"whether a_0/kernel.*or b_0/kernel.*comes first"),
        (layers(down=(4, 4), up=(4, 4)), r"whether down/kernel.*or up/kernel.*comes first"),
        (layers(layers_0=(3, 8), layers_1=(8, 8), out=(8, 8)), r"whether layers_1/kernel.*or out/kernel.*comes first"),
        # The gates of a recurrent cell.
        (layers(**{f"{a}{gate}": (4, 4) for a in "hi" for gate in "fgio"}), r"names do not tell whether.*comes first"),
        # Names do not chain in natural order, whatever the shapes say.
        (layers(trunk=(3, 4), head=(4, 2)), r"head/kernel has 2 outputs, but trunk/kernel has 3 inputs.*natural order"),
        # Grouped, by depth, of another number of spatial axes.
        (
            layers(c_0=(3, 3, 2, 8), c_1=(3, 3, 1, 8)),
            r"c_1/kernel has 1 inputs \(a convolution in 8 groups or by depth",
        ),
        (
            layers(c_0=(3, 3, 2, 8), c_1=(3, 3, 4, 8)),
            r"c_1/kernel has 4 inputs \(a convolution in 2 groups or by depth",
        ),
        (layers(c_0=(3, 3, 2, 8), c_1=(3, 8, 8)), r"c_0/kernel.*2 spatial axes, but c_1/kernel \(3, 8, 8\) has 1"),
        (layers(c_0=(3, 3, 2, 8), d_0=(12, 4)), r"8 outputs, but d_0/kernel has 12 inputs, which is no multiple"),
        # A decoder: dense layers first.
        (
            layers(layer_0=(5, 8), layer_1=(3, 3, 2, 4)),
            r"the convolution layer_1/kernel.*follows the dense layer layer_0",
        ),
        (layers(c_0=(3, 3, 8, 1), d_0=(5, 32)), r"whether c_0/kernel.*feeds d_0/kernel.*or d_0/kernel.*feeds c_0/ker"),
        # Flattened in an order nobody knows.
        (
            layers("weight", a_0=(8, 1, 3, 3)) | layers(b_0=(16, 4)),
            r"b_0/kernel \(16, 4\) reads 2 positions of each output of a_0/weight \(8, 1, 3, 3\), in an order",
        ),
        (
            layers("weight", c_0=(4, 2, 3, 3)) | layers(c_1=(3, 3, 4, 8), d_0=(8, 2)),
            r"c_0/weight and c_1.*laid out alike",
        ),
        (
            layers("weight", False, c_0=(4, 2, 3, 3)) | layers("kernel", False, c_1=(3, 3, 4, 8), d_0=(8, 2)),
            r"c_0/weight and c_1/kernel are not laid out alike",
        ),
        # Networks stacked along the first axis look like convolutions of one spatial axis.
        (layers("kernel", False, d_0=(9, 3, 4), d_1=(9, 4, 2)), r"stacked along the first axis"),
        (layers("weight", False, d_0=(9, 4, 3)), r"stacked along the first axis"),
        # The layers of nn.scan before a dense one.
        (layers("kernel", False, d_0=(3, 4, 4), d_1=(4, 2)), r"layers or networks stacked along the first axis"),
        # Kernels with other axes.
        (
            layers(c_0=(3, 3, 1, 4), ConvTranspose_0=(3, 3, 4, 4)),
            r"ConvTranspose_0/bias.*transposed convolution or an em",
        ),
        (layers("weight", False, token_embedding=(4, 4), x=(2, 4)), r"token_embedding/weight \(4, 4\) seems to belong"),
        (layers(dense=(2, 2, 2, 2, 3, 4)), r"dense/kernel.*two to five axes"),
        ({"dense": {"kernel": shape(3, 0)}}, r"dense/kernel \(3, 0\) is not the kernel"),
        (
            {"dense": {"kernel": shape(3, 4), "bias": shape(4, 1, 1)}},
            r"dense/bias \(4, 1, 1\) is not the bias of the k",
        ),
        ({"attention": {"kernel": shape(8, 2, 4), "bias": shape(2, 4)}}, r"attention/bias \(2, 4\) is not"),
        (layers(c_0=(3, 3, 1, 4)) | {"norm": {"scale": shape(4)}}, r"norm/scale \(4,\) is not"),
        # Matrices without names that tell the order of their axes.
        (pairs((4, 4, 4, 4)), r"whether 0/0 \(4, 4\) is \[in, out\] or \[out, in\]"),
        (dicts(pairs((4, 4, 4)), "w"), r"whether 0/w \(4, 4\) is \[in, out\] or \[out, in\]"),
        ({"W0": shape(8, 3), "W1": shape(3, 8)}, r"whether W0 \(8, 3\) is \[in, out\] or \[out, in\]"),
        (
            {"conv": {"kernel": shape(2, 2, 1, 4), "bias": shape(4)}, "dense": pairs((16, 16, 16))},
            r"whether dense/0/0 \(16, 16\) is \[in, out\]",
        ),
        (
            {"conv": {"kernel": shape(2, 2, 1, 4), "bias": shape(4)}, "dense": pairs((16, 8, 3), out_first=True)},
            r"dense/0/0 \(8, 16\) reads 4 positions.*in an order that is not known",
        ),
        # Numbers have to tell the order of those: with the axes the other way round, shapes tell the reverse.
        ({"trunk": {"W": shape(3, 4)}, "head": {"W": shape(4, 2)}}, r"names do not tell where head/W \(4, 2\) stands"),
        ({"trunk": [shape(3, 4)], "head": [shape(4, 2)]}, r"names do not tell where head/0 \(4, 2\) stands"),
        ((pairs((3, 5, 4)), pairs((4, 5, 1))), r"names do not tell where 1/0/0 \(4, 5\) stands"),
        ([shape(3, 5), shape(5)], r"names do not tell where 0 \(3, 5\) stands"),
        ({"Dense_0": {"kernel": shape(3, 4)}, "out": pairs((4, 2))}, r"whether Dense_0/kernel or out/0/0 comes first"),
        (
            {"W0": shape(3, 4), "W1": shape(4, 4), "W2": shape(4, 4), "b1": shape(4), "b2": shape(4)},
            r"W0 has no bias, but a later layer has one",
        ),
        (
            [(shape(3, 4), shape(4)), (shape(2, 4), shape(2))],
            r"neither .*layer 1: the kernel 1/0 \(2, 4\) has 4 outputs, but the bias has 2.*layer 0: the kernel 0/0",
        ),
        (
            [(shape(5, 3), shape(5)), (shape(2, 4), shape(2))],
            r"nor with matrices \[out, in\]: layers do not chain: 0/0 has 5 outputs, but 1/0 has 4 inputs",
        ),
        ([(shape(3, 4), shape(4)), (shape(4), shape(4)), (shape(4, 2), shape(2))], r"leaf 1/0 \(4,\) is not"),
        ([(shape(3, 4), shape(1, 4)), (shape(4, 2), shape(2))], r"leaf 0/1 \(1, 4\) is not"),
        ([shape(3, 4), shape(4), shape(4, 2), shape(2)], r"leaf 2 \(4, 2\) is not"),
        ({"W0": shape(3, 3, 1, 4), "b0": shape(4)}, r"leaf W0 \(3, 3, 1, 4\) is not"),
        (shape(3, 4), r"leaf <root> \(3, 4\) is not"),
        (layers(c_0=(3, 3, 4, 4), d_0=(4, 8)), r"whether c_0/kernel.*feeds d_0/kernel.*or d_0/kernel.*feeds c_0/ker"),
    ],
)
def test_infer_spec_refuses_what_it_cannot_know(params, message):
    with pytest.raises(ValueError, match=message) as raised:
        infer_spec(params)
    assert "trace_spec" in str(raised.value)


@pytest.mark.parametrize(
    ("params", "order"),
    [
        (layers(encoder=(8, 3), head=(3, 2)), ["encoder", "head"]),
        (layers(conv=(3, 2, 4), conv1=(3, 4, 4), fc=(4, 8), fc_1=(8, 8)), ["conv", "conv1", "fc", "fc_1"]),
        (layers(linear=(4, 4), linear_1=(4, 4), linear_2=(4, 4)), ["linear", "linear_1", "linear_2"]),
        (layers(x_2=(3, 3, 1, 4), x_10=(3, 3, 4, 1), x_11=(6, 3)), ["x_2", "x_10", "x_11"]),
        (layers(Conv_0=(3, 3, 1, 4), Dense_0=(12, 5)), ["Conv_0", "Dense_0"]),
        (layers(**{f"block_{i}": (4, 4) for i in range(300)}), [f"block_{i}" for i in range(300)]),
    ],
)
def test_infer_spec_reads_an_order_that_names_or_shapes_tell(params, order):
    assert [group.name.split("/")[0] for group in infer_spec(params).edge_groups] == order


def test_infer_spec_follows_the_only_order_quickly_where_there_are_many_names():
    names = [f"{chr(97 + i)}_layer" for i in range(20)]
    params = plain_params(names, list(itertools.pairwise(range(2, 23))))
    assert [group.name.split("/")[0] for group in infer_spec(params).edge_groups] == names
    with pytest.raises(ValueError, match="names do not tell"):
        infer_spec(plain_params(names, [(4, 4)] * 20))


def test_names_of_modules_in_modules_are_in_natural_order():
    ends = {"block": (3, 4), "block1": (4, 5), "block2": (5, 2)}
    params = {name: {"dense": {"kernel": shape(*of)}} for name, of in ends.items()}
    assert [group.name.split("/")[0] for group in infer_spec(params).edge_groups] == [*ends]
