"""The language of axis actions against brute force: what `old_places` says is what moving the neurons does."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.actions import (
    AxisAction,
    check_actions,
    check_neighbours,
    concat,
    dependencies,
    fixed,
    index_array,
    is_free,
    letters,
    neighbours,
    old_places,
    orbits,
    permutation,
    places_along,
    product,
    stack,
)

A, B, PIN = permutation("a", 3), permutation("b", 4), fixed("pin", 2, "test")
INNER = permutation("inner", 4, per=[A])
LAYERS = fixed("layers", 2, "scan")
H0, H1 = permutation("h0", 3), permutation("h1", 3)
I0, I1 = permutation("i0", 4, per=[H0]), permutation("i1", 4, per=[H1])
WORDS = {
    "ab": product("ab", [A, B]),
    "ba": product("ba", [B, A]),
    "a_inner": product("a_inner", [A, INNER]),
    "inner_a": product("inner_a", [INNER, A]),
    "a_then_b": concat("a_then_b", [A, PIN, B]),
    "aa": concat("aa", [A, A]),
    "square": product("square", [A, A]),
    "pin_a": product("pin_a", [PIN, A]),
    "stacked": stack("stacked", [H0, H1], per=LAYERS),
    "stacked_inner": stack("stacked_inner", [I0, I1], per=LAYERS),
    "stacked_b": stack("stacked_b", [B, B], per=LAYERS),
}
WORDS["nested"] = product("nested", [A, concat("of_a", [INNER, PIN, INNER])])
WORDS["all_layers"] = product("all_layers", [LAYERS, WORDS["stacked"], WORDS["stacked_inner"]])
ALL = [A, B, PIN, INNER, LAYERS, H0, H1, I0, I1, *WORDS.values()]
ALL.insert(ALL.index(WORDS["nested"]), concat("of_a", [INNER, PIN, INNER]))
ACTIONS = {action.id: action for action in ALL}


@pytest.fixture
def perms():
    rng = np.random.default_rng(0)
    return {
        a.id: rng.permuted(
            np.broadcast_to(np.arange(a.size), (*(ACTIONS[p].size for p in a.per), a.size)), axis=-1
        ).astype(np.int32)
        for a in ALL
        if a.kind == "permutation"
    }


def moved(array, axes, perms):
    """`new` of a parameter with these actions on its axes, entry by entry as the docstring defines it."""
    new = np.zeros_like(array)
    ids = [axis.id for axis in axes]
    for entry in np.ndindex(*array.shape):
        places = [np.array([p], np.int32) for p in entry]
        old = [
            int(old_places(ACTIONS, perms, id, places[i], neighbours(ACTIONS, ids, places, i))[0])
            for i, id in enumerate(ids)
        ]
        new[entry] = array[tuple(old)]
    return new


def test_the_language_is_well_formed():
    check_actions(ALL)


def test_a_letter_is_its_index_array(perms):
    x = np.arange(4)
    np.testing.assert_array_equal(moved(x, [B], perms), x[perms["b"]])
    np.testing.assert_array_equal(moved(np.arange(2), [PIN], perms), [0, 1])
    np.testing.assert_array_equal(index_array(ACTIONS, {}, "b"), np.arange(4))


def test_a_letter_for_each_place_of_another_axis(perms):
    """`[heads, inner]`: the heads move as wholes, and what stood in them in an order of its own."""
    x = np.arange(12).reshape(3, 4)
    expected = np.stack([x[perms["a"][i]][perms["inner"][i]] for i in range(3)])
    np.testing.assert_array_equal(moved(x, [A, INNER], perms), expected)
    np.testing.assert_array_equal(moved(x.T, [INNER, A], perms), expected.T)
    np.testing.assert_array_equal(moved(x.reshape(-1), [WORDS["a_inner"]], perms), expected.reshape(-1))
    np.testing.assert_array_equal(moved(x.T.reshape(-1), [WORDS["inner_a"]], perms), expected.T.reshape(-1))
    assert index_array(ACTIONS, perms, "inner").shape == (3, 4)
    np.testing.assert_array_equal(index_array(ACTIONS, perms, "inner"), perms["inner"])


def test_products_are_row_major(perms):
    x = np.arange(12).reshape(3, 4)
    expected = x[perms["a"]][:, perms["b"]]
    np.testing.assert_array_equal(moved(x.reshape(-1), [WORDS["ab"]], perms), expected.reshape(-1))
    np.testing.assert_array_equal(moved(x.T.reshape(-1), [WORDS["ba"]], perms), expected.T.reshape(-1))
    square = np.arange(9).reshape(3, 3)
    expected = square[perms["a"]][:, perms["a"]]
    np.testing.assert_array_equal(moved(square.reshape(-1), [WORDS["square"]], perms), expected.reshape(-1))


def test_concatenations_keep_their_parts_apart(perms):
    x = np.arange(9)
    expected = np.concatenate([x[:3][perms["a"]], x[3:5], x[5:][perms["b"]]])
    np.testing.assert_array_equal(moved(x, [WORDS["a_then_b"]], perms), expected)
    expected = np.concatenate([x[:3][perms["a"]], x[3:6][perms["a"]]])
    np.testing.assert_array_equal(moved(x[:6], [WORDS["aa"]], perms), expected)


def test_a_concatenation_within_a_product_moves_by_the_place_around_it(perms):
    x = np.arange(30).reshape(3, 10)
    expected = []
    for i in range(3):
        row, inner = x[perms["a"][i]], perms["inner"][i]
        expected.append(np.concatenate([row[:4][inner], row[4:6], row[6:][inner]]))
    np.testing.assert_array_equal(moved(x.reshape(-1), [WORDS["nested"]], perms), np.concatenate(expected))


def test_stacks_move_each_slice_on_its_own(perms):
    x = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    expected = np.stack(
        [
            np.stack([layer[perms[h][i]][perms[inner][i]] for i in range(3)])
            for layer, h, inner in zip(x, ("h0", "h1"), ("i0", "i1"), strict=True)
        ]
    )
    axes = [LAYERS, WORDS["stacked"], WORDS["stacked_inner"]]
    np.testing.assert_array_equal(moved(x, axes, perms), expected)
    np.testing.assert_array_equal(moved(x.reshape(-1), [WORDS["all_layers"]], perms), expected.reshape(-1))
    assert index_array(ACTIONS, perms, "stacked").shape == (2, 3)
    assert index_array(ACTIONS, perms, "stacked_inner").shape == (2, 3, 4)
    np.testing.assert_array_equal(index_array(ACTIONS, perms, "stacked_inner"), [perms["i0"], perms["i1"]])


@pytest.mark.parametrize("id", [a.id for a in ALL])
def test_index_arrays_are_permutations_and_traceable(id, perms):
    array = index_array(ACTIONS, perms, id)
    assert array.shape[-1] == ACTIONS[id].size
    assert (np.sort(array, axis=-1) == np.arange(ACTIONS[id].size)).all()
    in_jax = index_array(ACTIONS, {k: jnp.asarray(v) for k, v in perms.items()}, id)
    np.testing.assert_array_equal(in_jax, array)
    assert in_jax.dtype == jnp.int32
    assert is_free(ACTIONS, id) == (array != np.arange(ACTIONS[id].size)).any()


def test_letters_and_dependencies():
    assert letters(ACTIONS, "nested") == ("a", "inner", "pin")
    assert letters(ACTIONS, "square") == ("a",)
    assert dependencies(ACTIONS, "inner") == (("a",),)
    assert dependencies(ACTIONS, "nested") == ()
    assert dependencies(ACTIONS, "of_a") == (("a",),)
    assert dependencies(ACTIONS, "stacked") == (("layers",),)
    assert dependencies(ACTIONS, "stacked_inner") == (("layers",), ("h0", "h1"))
    assert dependencies(ACTIONS, "all_layers") == ()


def test_places_along():
    places = np.arange(12, dtype=np.int32)
    np.testing.assert_array_equal(places_along(ACTIONS, "ab", "b", places), np.tile(np.arange(4), 3))
    np.testing.assert_array_equal(places_along(ACTIONS, "ba", "b", places), np.repeat(np.arange(4), 3))
    np.testing.assert_array_equal(places_along(ACTIONS, "aa", "a", places[:6]), [0, 1, 2] * 2)
    assert places_along(ACTIONS, "a_then_b", "a", places[:9]) is None
    assert places_along(ACTIONS, "b", "a", places[:4]) is None


def test_orbits_are_what_may_change_places():
    """Against the definition: the finest numbering that no permutation changes, seen by many random ones."""
    rng = np.random.default_rng(1)
    for action in ALL:
        if dependencies(ACTIONS, action.id):
            continue
        numbers = np.arange(action.size)
        for _ in range(40):
            perms = {
                a.id: rng.permuted(
                    np.broadcast_to(np.arange(a.size), (*(ACTIONS[p].size for p in a.per), a.size)), axis=-1
                ).astype(np.int32)
                for a in ALL
                if a.kind == "permutation"
            }
            for new, old in enumerate(index_array(ACTIONS, perms, action.id)):
                numbers[numbers == numbers[old]] = numbers[new]
        received = orbits(ACTIONS, action.id)
        pairs = itertools.combinations(range(action.size), 2)
        if action.id == "square":  # its diagonal never mixes with the rest, which a spec need not know
            assert received.max() == 0
            continue
        assert all((numbers[i] == numbers[j]) == (received[i] == received[j]) for i, j in pairs), action.id
        assert set(received) == set(range(received.max() + 1))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([A, A], "two actions share the id 'a'"),
        ([WORDS["ab"]], r"'ab' names \['a', 'b'\], which are not among the actions before it"),
        ([INNER, A], r"'inner' names \['a'\]"),
        ([A, B, AxisAction("ab", 13, "product", ("a", "b"))], r"'ab' of kind product has size 13.*expected size 12"),
        ([A, B, AxisAction("ab", 12, "concat", ("a", "b"))], r"'ab' of kind concat.*expected size 7"),
        ([A, AxisAction("x", 3, "permutation", ("a",))], r"'x' of kind permutation.*expected no parts"),
        ([A, AxisAction("x", 3, "mystery", ("a",))], r"kind mystery.*expected one of the kinds"),
        ([A, B, AxisAction("x", 7, "concat", ("a", "b"), per=("a",))], r"'x'.*expected no per"),
        (
            [LAYERS, A, AxisAction("x", 3, "stack", ("a",), per=("layers",))],
            r"'x' of kind stack.*one part of its own size",
        ),
        ([LAYERS, A, AxisAction("x", 3, "stack", ("a", "a"))], r"'x' of kind stack.*the one id in per"),
        ([fixed("x", 0, "empty")], r"'x' has size 0"),
        (
            [A, INNER, WORDS["aa"], AxisAction("x", 72, "product", ("aa", "inner", "a"))],
            r"part 'inner' depends on 'a', which is there several times",
        ),
    ],
)
def test_actions_that_do_not_fit_are_refused(actions, message):
    with pytest.raises(ValueError, match=message):
        check_actions(actions)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("inner",), r"axis 0 depends on 'a', which stands on 0 of its other axes"),
        (("b", "inner"), r"axis 1 depends on 'a', which stands on 0"),
        (("a", "inner", "ab"), r"axis 1 depends on 'a', which stands on 2"),
        (("stacked",), r"axis 0 depends on 'layers'"),
        (("layers", "stacked_inner"), r"axis 1 depends on 'h0', which stands on 0"),
        (("a_then_b", "inner"), r"axis 1 depends on 'a', which stands on 0"),
    ],
)
def test_axes_that_do_not_tell_what_they_depend_on_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        check_neighbours(ACTIONS, ids)
    check_neighbours(ACTIONS, ("layers", "stacked", "stacked_inner"))
    check_neighbours(ACTIONS, ("a_inner",))
    check_neighbours(ACTIONS, ("inner", "b", "a"))
