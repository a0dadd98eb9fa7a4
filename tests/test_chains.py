import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.chains import cnn_spec, mlp_spec
from ngjax.spec import NeuralGraphSpec, format_path

SIZES = (3, 5, 4, 2)


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


def test_mlp_spec_of_one_layer_has_no_symmetry():
    spec = mlp_spec([4, 3])
    assert [g.role for g in spec.node_groups] == ["input", "output"]
    assert not any(spec.is_free(action.id) for action in spec.actions)


def test_mlp_spec_has_more_than_ten_layers_in_order():
    sizes = list(range(3, 16))
    spec = mlp_spec(sizes)
    ends_of = list(itertools.pairwise(sizes))
    assert shapes_by_layer(spec) == ends_of
    names = [format_path(spec.params[group.view.param].path) for group in spec.edge_groups]
    assert names == [f"layer_{i}/kernel" for i in range(12)]
    layers = {f"layer_{i}": {"kernel": np.zeros(ends), "bias": np.zeros(ends[1:])} for i, ends in enumerate(ends_of)}
    assert [param.shape for param in spec.params] == [leaf.shape for leaf in jax.tree.leaves(layers)]


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


# -- cnn_spec ----------------------------------------------------------------------------------------------------------


def test_cnn_spec_describes_the_layers():
    spec = cnn_spec((3, 16, 32), kernel_size=(5, 3), dense=(64, 10), positions=49, activation="gelu")
    assert [(g.name, g.size, g.role, g.level, g.activation, g.slots) for g in spec.node_groups] == [
        ("input", 3, "input", 0, "none", 3),
        ("hidden_1", 16, "hidden", 1, "gelu", 1),
        ("hidden_2", 32, "hidden", 2, "gelu", 1),
        ("hidden_3", 64, "hidden", 3, "gelu", 1),
        ("output", 10, "output", 4, "none", 10),
    ]
    assert [(g.name, g.source, g.target, g.kernel_shape) for g in spec.edge_groups] == [
        ("layer_0/kernel", "input", "hidden_1", (5, 3)),
        ("layer_1/kernel", "hidden_1", "hidden_2", (5, 3)),
        ("layer_2/kernel", "hidden_2", "hidden_3", (49,)),
        ("layer_3/kernel", "hidden_3", "output", ()),
    ]
    shapes = {format_path(param.path): param.shape for param in spec.params}
    assert shapes["layer_0/kernel"] == (5, 3, 3, 16)
    assert shapes["layer_2/kernel"] == (49 * 32, 64)
    assert shapes["layer_3/bias"] == (10,)
    flattened = spec.symmetry["layer_2"]["kernel"][0]
    assert spec.action[flattened].parts == ("layer_2/kernel:positions", "hidden_2")
    assert spec.symmetry["layer_1"] == {"bias": ("hidden_2",), "kernel": (None, None, "hidden_1", "hidden_2")}
    assert NeuralGraphSpec.from_json(spec.to_json()) == spec


def test_cnn_spec_takes_a_kernel_shape_for_each_convolution():
    spec = cnn_spec((1, 4, 5), kernel_size=[(5,), (3,)], dtype=jnp.bfloat16)
    assert [param.shape for param in spec.params] == [(4,), (5, 1, 4), (5,), (3, 4, 5)]
    assert [g.role for g in spec.node_groups] == ["input", "hidden", "output"]
    assert {param.dtype for param in spec.params} == {"bfloat16"}


def test_cnn_spec_has_more_than_ten_layers_in_order():
    spec = cnn_spec(range(1, 9), kernel_size=(3, 3), dense=range(9, 14))
    assert shapes_by_layer(spec) == list(itertools.pairwise(range(1, 14)))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"at least two numbers of channels.*received \(3,\)", {"channels": (3,)}),
        (ValueError, r"at least two numbers of channels.*received \(3, 0\)", {"channels": (3, 0)}),
        (ValueError, r"one for each of 2 convolutions; received \[\(3, 3\)\]", {"kernel_size": [(3, 3)]}),
        (ValueError, r"one for each of 2 convolutions; received \[\(3, 3\), 3\]", {"kernel_size": [(3, 3), 3]}),
        (ValueError, r"one to three spatial axes.*received \[\(3, 0\)", {"kernel_size": (3, 0)}),
        (ValueError, r"one to three spatial axes.*received \[\(3, 3, 3, 3\)", {"kernel_size": (3, 3, 3, 3)}),
        (ValueError, r"one to three spatial axes.*received \[\(\)", {"kernel_size": ()}),
        (ValueError, r"as many in all.*received \[\(3, 3\), \(3,\)\]", {"kernel_size": [(3, 3), (3,)]}),
        (TypeError, r"kernel.size", {"kernel_size": 3}),
        (TypeError, "float", {"kernel_size": (3, 2.5)}),
        (ValueError, r"positive widths.*dense=\(8, 0\)", {"dense": (8, 0)}),
        (ValueError, r"positive widths.*positions=0", {"dense": (8,), "positions": 0}),
        (ValueError, r"positions=4 without dense", {"positions": 4}),
        (ValueError, r"unknown activation 'rleu'", {"activation": "rleu"}),
    ],
)
def test_cnn_spec_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        cnn_spec(**({"channels": (3, 4, 5), "kernel_size": (3, 3)} | arguments))
