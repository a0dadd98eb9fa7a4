"""Blocks make up each parameter, and move as the action language says."""

import numpy as np
import pytest

from ngjax.actions import concat, fixed, neighbours, old_places, permutation, product, stack
from ngjax.blocks import block_layouts, move, spread_rows
from tests import test_six_architectures as six


def random_perms(spec, rng):
    """Index arrays of the independent permutations, drawn by numpy: nothing is compiled."""
    shapes = six.letter_shapes(spec)
    return {id: rng.permuted(six.identity(shape), axis=-1) for id, shape in shapes.items()}


def permuted_leaf(actions, perms, ids, leaf):
    """A leaf permuted by the action language itself."""
    grid = np.meshgrid(*(np.arange(n, dtype=np.int32) for n in leaf.shape), indexing="ij")
    places = [
        old_places(actions, perms, id, grid[axis], neighbours(actions, ids, grid, axis)) for axis, id in enumerate(ids)
    ]
    return leaf[tuple(places)]


@pytest.mark.parametrize("name", six.BUILDERS)
def test_blocks_cover_each_parameter_once_and_move_as_it_does(name):
    spec, rng = six.build(name).spec, np.random.default_rng(0)
    perms = random_perms(spec, rng)
    tables = {id: perm.reshape(-1, perm.shape[-1]) for id, perm in perms.items()}
    ranks = {action.id: i for i, action in enumerate(spec.actions)}
    for param in spec.params:
        if not param.shape:
            continue
        leaf = np.arange(np.prod(param.shape, dtype=int)).reshape(param.shape)
        after, covered = permuted_leaf(spec.action, perms, param.axes, leaf), []
        for layout in block_layouts(spec.action, param.axes):
            covered += leaf[layout.places].ravel().tolist()
            np.testing.assert_array_equal(move(leaf[layout.places], layout.axes, tables, ranks), after[layout.places])
        assert sorted(covered) == leaf.ravel().tolist()


def test_axes_by_hand():
    heads, logits = permutation("heads", 2), fixed("logits", 4, "output")
    inner = permutation("inner", 3, per=[heads])
    flat = product("flat", [heads, inner])
    both = concat("both", [logits, flat])
    actions = {action.id: action for action in (heads, logits, inner, flat, both)}
    pinned, free = block_layouts(actions, ["both"])
    assert [axis.letter for axis in pinned.axes] == [""]
    np.testing.assert_array_equal(pinned.places[0], [0, 1, 2, 3])
    assert [axis.letter for axis in free.axes] == ["heads", "inner"]
    assert [axis.on for axis in free.axes] == [(), (0,)]
    np.testing.assert_array_equal(free.places[0], [[4, 5, 6], [7, 8, 9]])
    np.testing.assert_array_equal(free.axes[1].rows, [[0], [1]])
    table = np.array([[10, 11, 12], [20, 21, 22]])
    np.testing.assert_array_equal(spread_rows(table, free.axes[1].rows, 1), table)


def test_its_own_axis_tells_the_place_before_others_do():
    """Heads on two axes of one leaf: the inner neurons of each go with the heads that stand beside them."""
    heads = permutation("heads", 2)
    inner = permutation("inner", 3, per=[heads])
    flat = product("flat", [heads, inner])
    [layout] = block_layouts({action.id: action for action in (heads, inner, flat)}, ["flat", "flat"])
    assert [axis.on for axis in layout.axes] == [(), (0,), (), (2,)]


def test_a_stack_is_cut_along_its_axis():
    layers, own = fixed("layers", 2, "scan"), [permutation(f"own_{i}", 3) for i in range(2)]
    stacked = stack("stacked", own, per=layers)
    actions = {action.id: action for action in (layers, *own, stacked)}
    layouts = block_layouts(actions, ["layers", "stacked"])
    assert [[axis.letter for axis in layout.axes] for layout in layouts] == [["own_0"], ["own_1"]]
    assert [int(layout.places[0].item()) for layout in layouts] == [0, 1]
    # A leaf that has the axis without the stack is not cut.
    assert len(block_layouts(actions, ["layers", "own_0"])) == 1


def test_what_stands_beside_a_stack_is_there_once():
    layers, own = fixed("layers", 2, "scan"), [permutation(f"own_{i}", 3) for i in range(2)]
    stacked, other = stack("stacked", own, per=layers), permutation("other", 4)
    flat = product("flat", [layers, stacked])
    both = concat("both", [flat, other])
    layouts = block_layouts({action.id: action for action in (layers, *own, stacked, other, flat, both)}, ["both"])
    found = {layout.axes[0].letter: layout.places[0].tolist() for layout in layouts}
    assert len(layouts) == 3
    assert found == {"own_0": [0, 1, 2], "own_1": [3, 4, 5], "other": [6, 7, 8, 9]}


def test_a_stack_along_an_axis_that_moves_is_refused():
    layers, own = permutation("layers", 2), [permutation(f"own_{i}", 3) for i in range(2)]
    stacked = stack("stacked", own, per=layers)
    with pytest.raises(ValueError, match="a stack along 'layers', which moves itself"):
        block_layouts({action.id: action for action in (layers, *own, stacked)}, ["layers", "stacked"])
