"""Networks brought into one another's order, and into an order of their own."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax import matching
from ngjax.chains import mlp_spec
from ngjax.matching import match_params, sort_params
from ngjax.symmetry import permute_params
from tests import test_six_architectures as six
from tests.test_blocks import permuted_leaf, random_perms


def mlp_params(sizes, seed):
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "kernel": rng.normal(size=(n_in, n_out)).astype(np.float32),
            "bias": rng.normal(size=n_out).astype(np.float32),
        }
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


def generic(shapes, seed):
    """Random leaves for the shapes of a tree, integers left as they are."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def permuted(spec, perms, params):
    """What `permute_params` does, without compiling anything."""
    leaves = zip(spec.params, spec.flatten(params), strict=True)
    return spec.unflatten([permuted_leaf(spec.action, perms, param.axes, leaf) for param, leaf in leaves], like=params)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(sum(np.sum((np.float64(x) - np.float64(y)) ** 2) for x, y in pairs))


def assert_same(received, expected):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, received, expected)


# -- what is found -----------------------------------------------------------------------------------------------------


def test_matching_by_hand():
    """Three hidden neurons; the second network has them in the order 2, 0, 1, and slightly different weights."""
    first = {
        "layer_0": {"kernel": np.float32([[1, 2, 3]]), "bias": np.float32([0, 0, 0])},
        "layer_1": {"kernel": np.float32([[5], [-5], [7]]), "bias": np.float32([0])},
    }
    target = {
        "layer_0": {"kernel": np.float32([[3.1, 0.9, 2]]), "bias": np.float32([0.1, 0, 0])},
        "layer_1": {"kernel": np.float32([[7], [5], [-4.9]]), "bias": np.float32([0])},
    }
    perms = match_params(mlp_spec([1, 3, 1]), first, target, key=jax.random.key(0))
    assert {id: perm.tolist() for id, perm in perms.items()} == {"hidden_1": [2, 0, 1]}
    assert perms["hidden_1"].dtype == np.int32


def test_one_hidden_layer_is_matched_as_well_as_can_be():
    sizes = (2, 5, 1)
    spec, params, target = mlp_spec(sizes), mlp_params(sizes, 0), mlp_params(sizes, 1)

    def by_hand(order):
        order = list(order)
        first, second = params["layer_0"], params["layer_1"]
        moved = {
            "layer_0": {"kernel": first["kernel"][:, order], "bias": first["bias"][order]},
            "layer_1": {"kernel": second["kernel"][order], "bias": second["bias"]},
        }
        return distance(moved, target)

    best = min(itertools.permutations(range(5)), key=by_hand)
    assert match_params(spec, params, target, key=jax.random.key(0))["hidden_1"].tolist() == list(best)


@pytest.mark.parametrize("start", ["found", "given"])
@pytest.mark.parametrize("seed", range(3))
def test_experts_are_matched_together_with_what_is_inside(seed, start, monkeypatch):
    """Two networks that have nothing to do with one another: all 3! x 4! x 4! x 4! orders are tried by hand.

    The best order of the neurons inside is found for each pair of experts alone. One step is enough for this, from
    whatever order.
    """
    if start == "given":
        monkeypatch.setattr(matching, "_from_pinned_inwards", lambda state: state)
    case = six.build("experts")
    params, target = six.perturbed_params(case, 2 * seed), six.perturbed_params(case, 2 * seed + 1)
    perms = match_params(case.spec, params, target, key=jax.random.key(seed))

    def pair(new, old):
        """The least distance, and order inside, with expert `old` of `params` in the place of `new` of the target."""
        router = np.sum((target["router"][:, new] - params["router"][:, old]) ** 2)
        return min(
            (
                router
                + np.sum((target["up"][new] - params["up"][old][:, order]) ** 2)
                + np.sum((target["down"][new] - params["down"][old][list(order)]) ** 2),
                order,
            )
            for order in itertools.permutations(range(4))
        )

    pairs = {(new, old): pair(new, old) for new in range(3) for old in range(3)}
    best = min(
        itertools.permutations(range(3)), key=lambda order: sum(pairs[new, old][0] for new, old in enumerate(order))
    )
    assert perms["experts"].tolist() == list(best)
    assert perms["inner"].tolist() == [list(pairs[new, old][1]) for new, old in enumerate(best)]


def check_recovers(spec, params, seed=0):
    rng = np.random.default_rng(seed)
    target = permuted(spec, random_perms(spec, rng), params)
    assert distance(params, target) > 0
    perms = match_params(spec, params, target, key=jax.random.key(seed))
    assert {id: perm.shape for id, perm in perms.items()} == six.letter_shapes(spec)
    assert_same(permuted(spec, perms, params), target)
    # Something else in the way: the same order is the best.
    noisy = jax.tree.map(lambda x: x + np.float32(1e-3) * rng.normal(size=x.shape).astype(np.float32), target)
    again = match_params(spec, params, noisy, key=jax.random.key(seed + 1))
    assert_same(permuted(spec, again, params), target)
    # And both have one order of their own.
    first, second = (permuted(spec, sort_params(spec, p), p) for p in (params, target))
    assert_same(first, second)


@pytest.mark.parametrize("name", six.BUILDERS)
def test_a_permuted_network_is_brought_back_exactly(name):
    case = six.build(name)
    check_recovers(case.spec, six.perturbed_params(case, 7))


def test_the_permutations_are_those_that_permute_params_takes():
    case = six.build("attention_interleaved")
    params = six.perturbed_params(case, 7)
    target = permuted(case.spec, random_perms(case.spec, np.random.default_rng(0)), params)
    perms = match_params(case.spec, params, target, key=jax.random.key(0))
    assert_same(jax.tree.map(np.asarray, permute_params(case.spec, perms, params)), target)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(3)(nn.gelu(nn.Dense(7)(x.reshape(x.shape[0], -1))))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        return nn.Dense(5)(x + nn.MultiHeadDotProductAttention(num_heads=3)(nn.LayerNorm()(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.GRUCell(5))(x)[:, -1])


@pytest.mark.parametrize(
    ("model", "shape"), [(Convolutions(), (1, 4, 4, 2)), (Attention(), (1, 5, 3)), (Recurrent(), (1, 3, 2))]
)
def test_traced_networks_are_brought_back_exactly(model, shape):
    example = jax.ShapeDtypeStruct(shape, np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    spec = ngjax.trace_spec(model.apply, shapes, example)
    assert any(action.kind == "permutation" for action in spec.actions)
    check_recovers(spec, generic(shapes, 0))


# -- how it is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense_net", "attention_heads", "group_norm_block", "scanned_chain", "lstm"])
def test_the_distance_never_increases(name, monkeypatch):
    """From step to step, with networks that have nothing to do with one another."""
    case = six.build(name)
    reached, offered, step = [], [], matching._step

    def watched(state, letter, rng):
        whole = state.targets is seen.setdefault("targets", state.targets)  # not the insides of a pair of heads
        perms = step(state, letter, rng)
        if whole:
            reached.append(sum(state.products))
            offered.append(sum(state.moved(perms).products))
        return perms

    monkeypatch.setattr(matching, "_step", watched)
    for seed in range(2):
        params, target = six.perturbed_params(case, 2 * seed), six.perturbed_params(case, 2 * seed + 1)
        seen, before = {}, len(reached)
        perms = match_params(case.spec, params, target, key=jax.random.key(seed))
        assert (np.diff(reached[before:]) >= 0).all()
        final = distance(permuted(case.spec, perms, params), target)
        assert final < distance(params, target)
        norms = (
            distance(params, jax.tree.map(np.zeros_like, params)),
            distance(target, jax.tree.map(np.zeros_like, target)),
        )
        pinned = sum(norms) - final - 2 * reached[-1]  # the products of what nothing moves
        start = sum(norms) - distance(params, target) - 2 * reached[before]
        assert start <= pinned + 1e-6
    if name == "lstm":  # where a step may be worse than it looked, and is then not taken
        assert any(there < here for here, there in zip(reached, offered, strict=True))


def test_no_neuron_can_be_moved_alone_in_the_end():
    sizes = (3, 6, 5, 2)
    spec, params, target = mlp_spec(sizes), mlp_params(sizes, 0), mlp_params(sizes, 1)
    perms = match_params(spec, params, target, key=jax.random.key(0))
    reached = distance(permuted(spec, perms, params), target)
    for id, perm in perms.items():
        for i, j in itertools.combinations(range(len(perm)), 2):
            swapped = perm.copy()
            swapped[[i, j]] = perm[[j, i]]
            assert distance(permuted(spec, {**perms, id: swapped}, params), target) > reached - 1e-6


def test_networks_that_are_in_order_already_stay_so():
    """Wide layers of noise, in which an order found anew could be further away than the one there is."""
    sizes = (1, 16, 16, 16, 1)
    spec, params = mlp_spec(sizes), mlp_params(sizes, 0)
    noise = mlp_params(sizes, 1)
    target = jax.tree.map(lambda x, y: x + np.float32(0.5) * y, params, noise)
    perms = match_params(spec, params, target, key=jax.random.key(0))
    assert distance(permuted(spec, perms, params), target) <= distance(params, target)


def test_matching_is_determined_by_the_key():
    case = six.build("lstm")
    params, target = six.perturbed_params(case, 0), six.perturbed_params(case, 1)
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        first, again = (match_params(case.spec, params, target, key=key) for _ in range(2))
        assert_same(first, again)


def test_networks_of_other_types():
    spec = mlp_spec([2, 3, 2], dtype="bfloat16")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), mlp_params((2, 3, 2), 0))
    perms = {"hidden_1": np.array([1, 2, 0], np.int32)}
    target = permute_params(spec, perms, params)
    assert_same(match_params(spec, params, target, key=jax.random.key(0)), perms)
    assert match_params(mlp_spec([2, 3]), mlp_params((2, 3), 0), mlp_params((2, 3), 1), key=jax.random.key(0)) == {}


# -- an order of their own ---------------------------------------------------------------------------------------------


def test_neurons_are_sorted_by_their_squares():
    params = {
        "layer_0": {"kernel": np.float32([[3, 1, 0]]), "bias": np.float32([0, 1, 2])},
        "layer_1": {"kernel": np.float32([[0], [1], [5]]), "bias": np.float32([9])},
    }  # sums of squares 9, 3, 29
    perms = sort_params(mlp_spec([1, 3, 1]), params)
    assert {id: perm.tolist() for id, perm in perms.items()} == {"hidden_1": [1, 0, 2]}


def sorted_from_many_orders(spec, params):
    """The different networks that become of one whose neurons are sorted from random orders."""
    found = set()
    for seed in range(8):
        other = permuted(spec, random_perms(spec, np.random.default_rng(seed)), params)
        found.add(b"".join(x.tobytes() for x in jax.tree.leaves(permuted(spec, sort_params(spec, other), other))))
    return found


def test_equal_squares_are_told_apart_by_the_weights():
    params = {
        "layer_0": {"kernel": np.float32([[1, 2, -1], [2, 1, 2]]), "bias": np.zeros(3, np.float32)},
        "layer_1": {"kernel": np.ones((3, 1), np.float32), "bias": np.zeros(1, np.float32)},
    }
    assert len(sorted_from_many_orders(mlp_spec([2, 3, 1]), params)) == 1


def test_equal_weights_are_told_apart_by_the_neurons_at_their_other_ends():
    """The neurons of the first layer differ only in which neurons of the second one their weights lead to."""
    params = {
        "layer_0": {"kernel": np.ones((1, 3), np.float32), "bias": np.zeros(3, np.float32)},
        "layer_1": {"kernel": np.float32([[1, 2, 3], [2, 3, 1], [3, 1, 2]]), "bias": np.zeros(3, np.float32)},
        "layer_2": {"kernel": np.float32([[1], [2], [3]]), "bias": np.zeros(1, np.float32)},
    }
    assert len(sorted_from_many_orders(mlp_spec([1, 3, 3, 1]), params)) == 1


def test_rounding_does_not_decide():
    """Two neurons with the same weights from others: their sums are equal only if they are rounded alike."""
    params = mlp_params((2, 24, 2, 1), 0)
    params["layer_1"]["kernel"][:, 1] = np.random.default_rng(1).permutation(params["layer_1"]["kernel"][:, 0])
    params["layer_1"]["bias"][:] = 0
    params["layer_2"]["kernel"][:] = 1
    assert len(sorted_from_many_orders(mlp_spec([2, 24, 2, 1]), params)) == 1


def test_twins_make_no_difference():
    params = mlp_params((2, 4, 1), 0)
    params["layer_0"]["kernel"][:, 1] = params["layer_0"]["kernel"][:, 3] = 0
    params["layer_0"]["bias"][[1, 3]] = 0
    params["layer_1"]["kernel"][[1, 3]] = 0
    assert len(sorted_from_many_orders(mlp_spec([2, 4, 1]), params)) == 1


# -- what is refused ---------------------------------------------------------------------------------------------------

SIZES = (2, 3, 1)


def with_nan(params):
    params["layer_0"]["bias"][1] = np.nan
    return params


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (mlp_params((2, 4, 1), 0), ValueError, r"parameter layer_0/bias: expected shape \(3,\).*received \(4,\)"),
        (
            jax.tree.map(lambda x: x[None], mlp_params(SIZES, 0)),
            ValueError,
            r"parameter layer_0/bias: expected shape \(3,\), without batch and feature axes, received \(1, 3\)",
        ),
        (with_nan(mlp_params(SIZES, 0)), ValueError, "parameter layer_0/bias .*NaN or infinite"),
        ({"layer_0": mlp_params(SIZES, 0)["layer_0"]}, ValueError, "parameter layer_1/bias .*is missing"),
        (jax.tree.map(lambda x: x.astype(np.int32), mlp_params(SIZES, 0)), TypeError, "parameter layer_0/bias.*int32"),
        (jax.eval_shape(lambda: mlp_params(SIZES, 0)), TypeError, "parameter layer_0/bias has no values"),
    ],
)
def test_wrong_parameters_are_refused(wrong, error, message):
    spec, right, key = mlp_spec(SIZES), mlp_params(SIZES, 0), jax.random.key(0)
    with pytest.raises(error, match=f"^params: {message}"):
        match_params(spec, wrong, right, key=key)
    with pytest.raises(error, match=f"^target: {message}"):
        match_params(spec, right, wrong, key=key)
    with pytest.raises(error, match=f"^params: {message}"):
        sort_params(spec, wrong)
