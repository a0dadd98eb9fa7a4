import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest

from ngjax.actions import concat, fixed, permutation, product
from ngjax.chains import mlp_spec
from ngjax.infer import infer_spec
from ngjax.spec import (
    ACTIVATIONS,
    AxisIds,
    EdgeGroup,
    NeuralGraphSpec,
    NodeGroup,
    NodeLayout,
    ParamSpec,
    ParamView,
    PathKey,
    flatten_with_path,
    format_path,
    pad_kernel_shape,
    param_view,
)

SPEC = mlp_spec([2, 4, 3, 1], activation="tanh")


def param(spec, name):
    return next(i for i, p in enumerate(spec.params) if format_path(p.path) == name)


def with_param(spec, name, **changes):
    i = param(spec, name)
    return dataclasses.replace(
        spec, params=(*spec.params[:i], spec.params[i]._replace(**changes), *spec.params[i + 1 :])
    )


def with_node(spec, i, **changes):
    groups = spec.node_groups
    return dataclasses.replace(spec, node_groups=(*groups[:i], groups[i]._replace(**changes), *groups[i + 1 :]))


def with_edge(spec, i, **changes):
    groups = spec.edge_groups
    return dataclasses.replace(spec, edge_groups=(*groups[:i], groups[i]._replace(**changes), *groups[i + 1 :]))


# -- values ------------------------------------------------------------------------------------------------------------


def test_specs_are_immutable_hashable_and_equal_by_value():
    again = mlp_spec([2, 4, 3, 1], activation="tanh")
    assert again is not SPEC
    assert again == SPEC
    assert hash(again) == hash(SPEC)
    assert {SPEC: 1}[again] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.params = ()


def test_specs_are_pickled_without_what_they_cache():
    hash(SPEC)
    assert "_hash" in vars(SPEC)
    received = pickle.loads(pickle.dumps(SPEC))
    assert received == SPEC
    assert received.treedef == SPEC.treedef
    assert set(vars(received)) == {field.name for field in dataclasses.fields(SPEC)}


@pytest.mark.parametrize(
    "other",
    [
        mlp_spec([2, 4, 3, 2], activation="tanh"),
        mlp_spec([2, 4, 3, 1], activation="relu"),
        mlp_spec([2, 4, 3, 1], activation="tanh", dtype="bfloat16"),
        with_edge(SPEC, 0, name="other"),
        dataclasses.replace(SPEC, edge_groups=SPEC.edge_groups[::-1]),
    ],
)
def test_specs_that_differ_in_anything_are_not_equal(other):
    assert other != SPEC


def test_the_treedef_takes_no_part_in_equality_and_is_rebuilt_from_the_paths():
    without = dataclasses.replace(SPEC, treedef=None)
    assert without == SPEC
    assert hash(without) == hash(SPEC)
    assert without.symmetry == SPEC.symmetry
    trees = [{"a": [{"b": 1.0, "c": 2.0}, (3.0, 4.0)], "d": {5: (6.0,)}}, [1.0, (2.0, [3.0])], (1.0,), 7.0]
    for tree in trees:
        pairs, _ = flatten_with_path(tree)
        params = tuple(ParamSpec(path, (), "float32") for path, _ in pairs)
        loose = tuple(param_view(i, ()) for i in range(len(params)))
        spec = NeuralGraphSpec(params, (), (), (), loose)
        assert spec.unflatten(spec.flatten(tree)) == tree
        assert NeuralGraphSpec.from_json(spec.to_json()).unflatten(spec.flatten(tree)) == tree


def test_a_sequence_with_leafless_entries_needs_like():
    """`[{"w"}, (), {"w"}]` looks like a list of two in its paths."""
    tree = [{"kernel": np.ones((2, 3), np.float32)}, (), {"kernel": np.ones((3, 1), np.float32)}]
    spec = infer_spec(tree)
    leaves = spec.flatten(tree)
    assert spec.unflatten(leaves)[1] == ()
    read = NeuralGraphSpec.from_json(spec.to_json())
    assert read.unflatten(leaves, like=tree)[1] == ()
    with pytest.raises(ValueError, match=r"list with leaves at \[0, 2\].*pass like="):
        read.unflatten(leaves)


def test_flatten_finds_leaves_by_path_and_names_those_that_differ():
    tree = SPEC.unflatten(list(range(6)))
    assert SPEC.flatten(tree) == list(range(6))
    assert SPEC.flatten(dict(reversed(tree.items()))) == list(range(6))
    with pytest.raises(ValueError, match=r"layer_2/bias \(1,\) of the spec is missing.*they have layer_0/bias"):
        SPEC.flatten({k: v for k, v in tree.items() if k != "layer_2"})
    with pytest.raises(ValueError, match=r"extra is not part of the spec, which has layer_0/bias.*layer_2/kernel"):
        SPEC.flatten(tree | {"extra": 1})
    with pytest.raises(ValueError, match=r"is missing.*\.\.\. \(30 in all\)"):
        SPEC.flatten({f"x{i}": i for i in range(30)})
    with pytest.raises(ValueError, match="is missing"):
        SPEC.unflatten(list(range(6)), like={})


def test_symmetry_mirrors_the_parameters_with_axis_ids_as_leaves():
    leaves = jax.tree.leaves(SPEC.symmetry)
    assert all(isinstance(leaf, AxisIds) for leaf in leaves)
    assert jax.tree.structure(SPEC.symmetry) == jax.tree.structure(SPEC.unflatten([0] * 6))
    assert leaves[param(SPEC, "layer_1/kernel")] == ("hidden_1", "hidden_2")
    assert repr(leaves[0]) == "AxisIds('hidden_1',)"


def test_pinned_lists_what_is_pinned_within_a_free_axis():
    image, free = fixed("image", 2, "input"), permutation("free", 3)
    both = concat("both", [image, free])
    spec = NeuralGraphSpec(
        (ParamSpec((PathKey("dict", "w"),), (5,), "float32", ("both",)),),
        (
            NodeGroup("a", 2, "hidden", 1, "image", bias=param_view(0, (5,), target=(0,), splits={0: (2,)})),
            NodeGroup("b", 3, "hidden", 1, "free", bias=param_view(0, (5,), target=(0,), starts={0: 2})),
        ),
        (),
        (image, free, both),
    )
    assert spec.symmetry == {"w": ("both",)}
    assert [(p.id, p.reason, p.axes) for p in spec.pinned] == [("image", "input", (("w", 0),))]


def test_pinned_words_name_every_reason():
    a, b = fixed("a", 2, "reshape"), fixed("b", 3, "sort")
    spec = NeuralGraphSpec(
        (ParamSpec((), (6,), "float32", ("ab",)),),
        (NodeGroup("n", 6, "input", 0, "ab"), NodeGroup("m", 6, "output", 1, "ab")),
        (EdgeGroup("e", "n", "m", blocks=6, view=param_view(0, (6,), block=(0,))),),
        (a, b, product("ab", [a, b])),
    )
    assert [(p.id, p.reason, p.axes) for p in spec.pinned] == [("ab", "reshape, sort", (("<root>", 0),))]


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_table_of_an_mlp():
    lines = str(SPEC).splitlines()
    assert lines[0] == "neural graph: 10 nodes, 23 edges, 31 parameters"
    assert lines[2].split() == ["node", "group", "size", "role", "level", "moves", "as", "activation", "bias"]
    assert lines[5].split() == ["hidden_1", "4", "hidden", "1", "hidden_1", "tanh", "layer_0/bias", "[4]"]
    assert "layer_1/kernel  hidden_1  hidden_2  dense  layer_1/kernel [4, 3]" in lines
    assert any(line.split() == ["hidden_2", "3", "-"] for line in lines)
    assert any(line.split() == ["output", "output", "layer_2/bias[0],", "layer_2/kernel[1]"] for line in lines)


def test_json_holds_a_version_and_is_refused_where_it_is_not_ours():
    data = json.loads(SPEC.to_json())
    assert (data["format"], data["version"]) == ("ngjax.spec", 1)
    assert NeuralGraphSpec.from_json(SPEC.to_json()) == SPEC
    for text, message in [
        ("{", "not a spec"),
        ("[]", "expected an object with format 'ngjax.spec'"),
        (json.dumps(data | {"format": "other"}), "expected an object with format 'ngjax.spec'"),
        (json.dumps(data | {"version": 2}), "format version 2; this library reads version 1"),
        (json.dumps({k: v for k, v in data.items() if k != "actions"}), r"missing or unknown \('actions'\)"),
        (json.dumps(data | {"actions": [{"id": "x"}]}), "missing or unknown"),
        (json.dumps(data | {"node_groups": data["node_groups"][:1]}), "unknown node group|one home"),
    ]:
        with pytest.raises(ValueError, match=message):
            NeuralGraphSpec.from_json(text)


def test_json_keeps_keys_that_are_no_strings():
    tree = {"layers": [{0: {"kernel": np.ones((2, 3), np.float32)}}]}
    spec = infer_spec(tree)
    assert NeuralGraphSpec.from_json(spec.to_json()) == spec
    assert [step.key for step in spec.params[0].path] == ["layers", 0, 0, "kernel"]


# -- views -------------------------------------------------------------------------------------------------------------


def test_views_say_their_shape_and_places():
    view = param_view(3, (5, 24), source=(0,), target=(2, 1), splits={1: (4, 6)})
    assert view == ParamView(3, (0, 0), (5, 24), ((5,), (4, 6)), source=(0,), target=(2, 1))
    assert view.shape == (1, 5, 24, 1)
    assert view.is_slice(1)
    np.testing.assert_array_equal(view.places(1), np.arange(24))
    gaps = param_view(0, (24,), target=(0, 1), starts={0: 2}, splits={0: (3, 2)}, strides={0: (8, 1)})
    assert gaps.sizes == (6,)
    assert not gaps.is_slice(0)
    np.testing.assert_array_equal(gaps.places(0), [2, 3, 10, 11, 18, 19])
    # A stride along a factor of length one, or the row-major ones, leave a slice a slice.
    for split, stride in (((1, 4), (99, 1)), ((2, 3), (3, 1)), ((4, 1), (1, 5))):
        view = param_view(0, (9,), target=(0, 1), starts={0: 1}, splits={0: split}, strides={0: stride})
        assert view.is_slice(0)
        np.testing.assert_array_equal(view.places(0), np.arange(1, 1 + view.sizes[0]))
    assert param_view(0, (3, 4), starts={1: 1}, source=(0,), target=(1,)).sizes == (3, 3)


def test_pad_kernel_shape():
    assert pad_kernel_shape(()) == (1, 1, 1)
    assert pad_kernel_shape((3, 5)) == (1, 3, 5)
    assert pad_kernel_shape((2, 3, 5)) == (2, 3, 5)
    with pytest.raises(ValueError, match=r"at most three spatial axes; received shape \(2, 2, 2, 2\)"):
        pad_kernel_shape((2, 2, 2, 2))


def test_activations_are_unique():
    assert len(set(ACTIVATIONS)) == len(ACTIVATIONS)


# -- what the constructor refuses --------------------------------------------------------------------------------------

KERNEL = SPEC.edge_groups[1].view  # layer_1/kernel, [4, 3]
BIAS = SPEC.node_groups[1].bias  # layer_0/bias, [4]
ONE = (ParamSpec((PathKey("dict", "w"),), (4,), "float32", ("n",)),)
HIDDEN = NodeGroup("n", 4, "hidden", 1, "n")


def one_group(**changes):
    """A group of four neurons and their biases."""
    fields = {
        "params": ONE,
        "node_groups": (HIDDEN._replace(bias=param_view(0, (4,), target=(0,))),),
        "edge_groups": (),
        "actions": (permutation("n", 4),),
    }
    return NeuralGraphSpec(**(fields | changes))


def overlapping():
    """As many homes as scalars, but one of these has two and another none."""
    views = (
        param_view(0, (6,), target=(0,), splits={0: (4,)}),
        param_view(0, (6,), target=(0,), starts={0: 3}, splits={0: (2,)}),
    )
    return one_group(
        params=(ONE[0]._replace(shape=(6,), axes=("m",)),),
        node_groups=(
            NodeGroup("n", 4, "hidden", 1, "n", bias=views[0]),
            NodeGroup("o", 2, "hidden", 1, "o", bias=views[1]),
        ),
        actions=(fixed("n", 4, "x"), fixed("o", 2, "x"), fixed("m", 6, "x")),
    )


def test_the_smallest_spec_is_accepted():
    assert one_group().num_nodes == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        # parameters and actions
        (
            lambda: dataclasses.replace(SPEC, actions=SPEC.actions[:-1]),
            r"layer_2/bias, axis 0.*no action for id 'output'",
        ),
        (
            lambda: with_param(SPEC, "layer_1/kernel", shape=(4, 5)),
            r"layer_1/kernel, axis 1: expected an action of size 5",
        ),
        (
            lambda: with_param(SPEC, "layer_1/kernel", axes=("hidden_1",)),
            r"layer_1/kernel: 1 axis ids for shape \(4, 3\)",
        ),
        (lambda: with_param(SPEC, "layer_1/bias", dtype="int32"), r"layer_1/bias is int32, only floating leaves"),
        (lambda: one_group(actions=(permutation("n", 4), permutation("n", 4))), "two actions share the id 'n'"),
        (
            lambda: one_group(params=(), node_groups=(HIDDEN,)),
            "needs at least one floating parameter",
        ),
        # node groups
        (lambda: with_node(SPEC, 2, name="hidden_1"), "two node groups share one name"),
        (lambda: dataclasses.replace(SPEC, node_groups=SPEC.node_groups[::-1]), "in the order inputs, hidden, outputs"),
        (lambda: with_node(SPEC, 1, level=3), "levels must be 0 for inputs.*not decrease"),
        (lambda: with_node(SPEC, 1, level=0), "levels must be 0 for inputs, positive for others"),
        (lambda: with_node(SPEC, 0, level=1), "levels must be 0 for inputs"),
        (
            lambda: with_node(SPEC, 1, activation="Relu"),
            r"node group 'hidden_1': unknown activation 'Relu'; known are none",
        ),
        (
            lambda: with_node(SPEC, 1, slots=4),
            r"'hidden_1': neurons that may change places.*slots of 1 or 1, received 4",
        ),
        (lambda: with_node(SPEC, 0, slots=3), r"'input':.*slots of 1 or 2, received 3"),
        (
            lambda: with_node(SPEC, 1, axis="mystery"),
            r"'hidden_1': expected the id of an action of size 4, received 'mys",
        ),
        (lambda: with_node(SPEC, 1, axis="hidden_2"), r"'hidden_1': expected the id of an action of size 4"),
        (
            lambda: with_node(SPEC, 1, size=5),
            r"'hidden_1': expected the id of an action of size 5, received 'hidden_1'",
        ),
        (lambda: one_group(node_groups=(HIDDEN._replace(role="input", level=0),)), "input neurons keep their order"),
        (
            lambda: one_group(node_groups=(HIDDEN._replace(role="output"),)),
            "output neurons keep their order.*'n' is free",
        ),
        (
            lambda: one_group(
                params=(ONE[0]._replace(axes=("m",)),),
                actions=(fixed("two", 2, "x"), permutation("n", 4, per=[fixed("two", 2, "x")]), fixed("m", 4, "x")),
            ),
            r"'n' depends on \('two',\), which is not part of it",
        ),
        (lambda: with_node(SPEC, 1, bias=None), r"layer_0/bias \(4,\): every scalar needs exactly one home.*0 of 4"),
        (
            lambda: with_node(SPEC, 2, bias=BIAS),
            r"bias of 'hidden_2': expected .* \(1, 1, 3, 1\), but layer_0/bias gives",
        ),
        # edge groups
        (
            lambda: with_edge(SPEC, 1, source="mystery"),
            r"edge group 'layer_1/kernel' names unknown node group 'mystery'",
        ),
        (
            lambda: with_edge(SPEC, 1, source="hidden_2"),
            r"'layer_1/kernel': expected .* \(1, 3, 3, 1\).*gives \(1, 4, 3, 1\)",
        ),
        (lambda: with_edge(SPEC, 1, blocks=2), "2 blocks do not divide the 3 neurons of 'hidden_2'"),
        (
            lambda: with_edge(SPEC, 1, view=None),
            r"layer_1/kernel \(4, 3\): every scalar needs exactly one home.*0 views",
        ),
        (
            lambda: with_edge(SPEC, 1, mirror=True),
            r"layer_1/kernel \(4, 3\): every scalar needs exactly one home.*0 views",
        ),
        (
            lambda: dataclasses.replace(
                SPEC, edge_groups=(*SPEC.edge_groups, SPEC.edge_groups[1]._replace(name="again"))
            ),
            r"layer_1/kernel \(4, 3\).*2 views hold 24 of 12 scalars and overlap",
        ),
        (
            lambda: one_group(
                edge_groups=(EdgeGroup("e", "n", "n", blocks=2, source_layout=NodeLayout((2, 3), block=(0,))),)
            ),
            r"NodeLayout\(splits=\(2, 3\), block=\(0,\)\) does not make 2 blocks of the 4 neurons of 'n'",
        ),
        (
            lambda: one_group(
                edge_groups=(EdgeGroup("e", "n", "n", blocks=4, target_layout=NodeLayout((2, 2), block=(0, 0))),)
            ),
            "does not make 4 blocks",
        ),
        (
            lambda: with_edge(SPEC, 1, source="hidden_2", view=KERNEL._replace(sizes=(3, 3), splits=((3,), (3,)))),
            r"layer_1/kernel \(4, 3\): every scalar needs exactly one home, but 1 views hold 9 of 12 scalars$",
        ),
        (overlapping, r"w \(6,\).*2 views hold 6 of 6 scalars and overlap"),
        # views
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(param=9)), "there is no parameter number 9"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(starts=(0,))), "does not have one entry per axis"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(starts=(1, 0))), r"does not fit layer_1/kernel \(4, 3\)"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(starts=(-1, 0))), "does not fit"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(splits=((2,), (3,)))), "does not fit"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(splits=((4, 0), (3,)))), "does not fit"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(strides=((2,), (1,)))), "does not fit"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(strides=((1,),))), "one positive stride per factor"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(strides=((0,), (1,)))), "one positive stride per factor"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(source=())), "every factor of layer_1/kernel longer than one"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(target=(0,))), "each may be used once; received"),
        (lambda: with_edge(SPEC, 1, view=KERNEL._replace(target=(7,))), "has 2 factors"),
        (
            lambda: with_edge(
                SPEC, 1, view=KERNEL._replace(splits=((2, 2), (3,)), kernel=(0,), source=(1,), target=(2,))
            ),
            r"expected \[blocks, source, target, kernel\] = \(1, 4, 3, 2\)",
        ),
        # loose scalars
        (
            lambda: one_group(node_groups=(HIDDEN,), loose=(param_view(0, (4,), target=(0,)),)),
            "does not move it as loose scalars, which stay in place",
        ),
        (
            lambda: one_group(
                params=tuple(ParamSpec((PathKey("dict", k),), (), "float32") for k in "ab"),
                node_groups=(HIDDEN,),
                loose=(param_view(1, ()), param_view(0, ())),
            ),
            "loose scalars must be in the order of the parameters",
        ),
        (
            lambda: one_group(loose=(param_view(0, (4,), target=(0,)),)),
            r"w \(4,\): every scalar needs exactly one home, but 2 views hold 8 of 4 scalars and overlap",
        ),
        # weights and nodes that do not move together
        (
            lambda: dataclasses.replace(
                SPEC,
                actions=(*SPEC.actions, permutation("other", 4)),
                params=(SPEC.params[0]._replace(axes=("other",)), *SPEC.params[1:]),
            ),
            r"layer_0/bias \(4,\), axis 0: its action 'other' does not move it as the neurons of 'hidden_1' move",
        ),
        (
            lambda: one_group(
                edge_groups=(EdgeGroup("e", "n", "m", blocks=2),),
                node_groups=(
                    HIDDEN._replace(bias=param_view(0, (4,), target=(0,))),
                    NodeGroup("m", 2, "hidden", 1, "m"),
                ),
                actions=(permutation("n", 4), fixed("m", 2, "x")),
            ),
            "'e': the neurons of 'n' and 'm' do not move so that its blocks stay together",
        ),
    ],
)
def test_the_constructor_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_constructor_refuses_complex_leaves():
    with pytest.raises(TypeError, match=r"parameter w is complex64: complex weights.*real and imaginary"):
        one_group(params=(ONE[0]._replace(dtype="complex64"),))


def test_the_constructor_refuses_kernels_of_four_axes():
    shape = (2, 2, 2, 2, 1, 1)
    axes = (fixed("k", 2, "conv"), fixed("one", 1, "x"))
    with pytest.raises(ValueError, match="at most three spatial axes"):
        NeuralGraphSpec(
            (ParamSpec((), shape, "float32", ("k", "k", "k", "k", "one", "one")),),
            (NodeGroup("a", 1, "input", 0, "one"), NodeGroup("b", 1, "output", 1, "one")),
            (EdgeGroup("e", "a", "b", view=param_view(0, shape, kernel=range(4), source=(4,), target=(5,))),),
            axes,
        )


def test_two_permutations_of_one_size_are_told_apart_even_of_two_neurons():
    """Both are swaps: only a trial in which one moves and the other does not sees that they are two."""
    actions = (permutation("n", 2), permutation("m", 2))
    params = (ParamSpec((PathKey("dict", "w"),), (2,), "float32", ("m",)),)
    with pytest.raises(ValueError, match="does not move it as the neurons of 'n' move"):
        one_group(
            params=params,
            actions=actions,
            node_groups=(NodeGroup("n", 2, "hidden", 1, "n", bias=param_view(0, (2,), target=(0,))),),
        )
