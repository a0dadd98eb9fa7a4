import dataclasses
import functools
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.actions import concat, fixed, permutation, product, stack
from ngjax.chains import mlp_spec
from ngjax.infer import infer_spec
from ngjax.spec import EdgeGroup, NeuralGraphSpec, NodeGroup, ParamSpec, PathKey, param_view
from ngjax.symmetry import permute_params, permute_randomly, random_permutations

SIZES = (2, 5, 3, 4)
SPEC = mlp_spec(SIZES)


def mlp_params(sizes=SIZES, lead=(), trail=(), seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return rng.normal(size=(*lead, *shape, *trail)).astype(np.float32)

    return {
        f"layer_{i}": {"kernel": leaf(n_in, n_out), "bias": leaf(n_out)}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


def by_hand(perms, params, lead=0):
    """What `permute_params` of the MLP has to give, by plain indexing."""
    order = [np.arange(2), np.asarray(perms["hidden_1"]), np.asarray(perms["hidden_2"]), np.arange(4)]
    return {
        f"layer_{i}": {
            "kernel": params[f"layer_{i}"]["kernel"].take(order[i], lead).take(order[i + 1], lead + 1),
            "bias": params[f"layer_{i}"]["bias"].take(order[i + 1], lead),
        }
        for i in range(3)
    }


def assert_same(received, expected):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, received, expected)


@functools.cache
def heads_spec():
    """Heads with an order of inner neurons in each, on two axes of one leaf and flat on another, scanned twice."""
    heads = permutation("heads", 3)
    inner = permutation("inner", 4, per=[heads])
    flat = product("flat", [heads, inner])
    layers = fixed("layers", 2, "scan")
    own = [permutation(f"own_{i}", 3) for i in range(2)]
    stacked = stack("stacked", own, per=layers)
    twice = concat("twice", [flat, flat])
    params = (
        ParamSpec((PathKey("dict", "a"),), (3, 4), "float32", ("heads", "inner")),
        ParamSpec((PathKey("dict", "b"),), (4, 3), "float32", ("inner", "heads")),
        ParamSpec((PathKey("dict", "c"),), (2, 3), "float32", ("layers", "stacked")),
        ParamSpec((PathKey("dict", "d"),), (24,), "float32", ("twice",)),
    )

    def biases(i, n):
        return param_view(3, (24,), target=(0,), starts={0: 12 * i}, splits={0: (n,)})

    nodes = (
        NodeGroup("one", 1, "input", 0, "one"),
        NodeGroup("x", 12, "hidden", 1, "flat", bias=biases(0, 12)),
        NodeGroup("y", 12, "hidden", 1, "flat", bias=biases(1, 12)),
        *(NodeGroup(f"o{i}", 3, "hidden", 1, f"own_{i}") for i in range(2)),
    )
    edges = (
        EdgeGroup("a", "one", "x", view=param_view(0, (3, 4), target=(0, 1))),
        EdgeGroup("b", "one", "y", view=param_view(1, (4, 3), target=(1, 0))),
        *(
            EdgeGroup(f"c{i}", "one", f"o{i}", view=param_view(2, (2, 3), target=(1,), starts={0: i}, splits={0: (1,)}))
            for i in range(2)
        ),
    )
    actions = (fixed("one", 1, "input"), heads, inner, flat, layers, *own, stacked, twice)
    return NeuralGraphSpec(params, nodes, edges, actions)


def heads_params(lead=(), trail=()):
    rng = np.random.default_rng(0)
    spec = heads_spec()
    return spec.unflatten([rng.normal(size=(*lead, *p.shape, *trail)).astype(np.float32) for p in spec.params])


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_permutations_of_every_free_id_with_full_length():
    perms = random_permutations(jax.random.key(0), SPEC)
    assert {id: p.shape for id, p in perms.items()} == {"hidden_1": (5,), "hidden_2": (3,)}
    perms = random_permutations(jax.random.key(0), heads_spec())
    assert {id: p.shape for id, p in perms.items()} == {
        "heads": (3,),
        "inner": (3, 4),
        "own_0": (3,),
        "own_1": (3,),
        "flat": (12,),
        "stacked": (2, 3),
        "twice": (24,),
    }
    for perm in perms.values():
        assert perm.dtype == jnp.int32
        np.testing.assert_array_equal(np.sort(perm, axis=-1), np.broadcast_to(np.arange(perm.shape[-1]), perm.shape))
    assert random_permutations(jax.random.key(0), mlp_spec([3, 2])) == {}


def test_built_ids_are_consistent_with_what_they_are_built_from():
    perms = {id: np.asarray(p) for id, p in random_permutations(jax.random.key(3), heads_spec()).items()}
    flat = np.concatenate([4 * perms["heads"][i] + perms["inner"][i] for i in range(3)])
    np.testing.assert_array_equal(perms["flat"], flat)
    np.testing.assert_array_equal(perms["twice"], np.concatenate([flat, 12 + flat]))
    np.testing.assert_array_equal(perms["stacked"], [perms["own_0"], perms["own_1"]])


def test_permutations_are_determined_by_the_key():
    first = random_permutations(jax.random.key(0), heads_spec())
    assert_same(random_permutations(jax.random.key(0), heads_spec()), first)
    others = [random_permutations(jax.random.key(seed), heads_spec()) for seed in range(1, 5)]
    assert any((np.asarray(other["inner"]) != np.asarray(first["inner"])).any() for other in others)


def test_all_permutations_are_equally_likely_and_independent():
    """3! = 6 orders, of two ids and of two places of one id: frequencies within five standard deviations."""
    keys = jax.random.split(jax.random.key(0), 3600)
    perms = jax.jit(jax.vmap(lambda key: random_permutations(key, heads_spec())))(keys)
    orders = {order: i for i, order in enumerate(itertools.permutations(range(3)))}

    def numbers(array):
        return np.array([orders[tuple(row)] for row in np.asarray(array).tolist()])

    heads, own = numbers(perms["heads"]), numbers(perms["own_1"])
    for counts, cells in ((np.bincount(heads, minlength=6), 6), (np.bincount(6 * heads + own, minlength=36), 36)):
        expected = 3600 / cells
        assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)
    first = np.asarray(perms["inner"])[:, :2, 0]  # where the first neuron of two heads comes from
    counts = np.bincount(4 * first[:, 0] + first[:, 1], minlength=16)
    assert np.abs(counts - 225).max() < 5 * math.sqrt(225)


def test_drawing_under_jit_and_vmap_gives_the_same():
    keys = jax.random.split(jax.random.key(5), 3)
    batched = jax.jit(jax.vmap(lambda key: random_permutations(key, SPEC)))(keys)
    for i in range(3):
        assert_same(jax.tree.map(lambda x: x[i], batched), random_permutations(keys[i], SPEC))  # noqa: B023


# -- applying ----------------------------------------------------------------------------------------------------------


def test_permuting_an_mlp_is_plain_indexing():
    perms, params = random_permutations(jax.random.key(1), SPEC), mlp_params()
    assert_same(permute_params(SPEC, perms, params), by_hand(perms, params))


def test_permuting_dependent_axes_is_plain_indexing():
    spec, params = heads_spec(), heads_params()
    perms = {id: np.asarray(p) for id, p in random_permutations(jax.random.key(1), spec).items()}
    received = permute_params(spec, perms, params)
    a = np.stack([params["a"][h][inner] for h, inner in zip(perms["heads"], perms["inner"], strict=True)])
    b = np.stack([params["b"][inner, h] for h, inner in zip(perms["heads"], perms["inner"], strict=True)], axis=1)
    c = np.stack([params["c"][0][perms["own_0"]], params["c"][1][perms["own_1"]]])
    assert_same(received, {"a": a, "b": b, "c": c, "d": params["d"][perms["twice"]]})


@pytest.mark.parametrize(("lead", "trail"), [((3,), ()), ((2, 3), ()), ((), (4,)), ((2,), (3,))])
def test_batch_and_feature_axes_stay_in_place(lead, trail):
    perms = random_permutations(jax.random.key(1), SPEC)
    params = mlp_params(lead=lead, trail=trail)
    assert_same(permute_params(SPEC, perms, params), by_hand(perms, params, len(lead)))
    spec, params = heads_spec(), heads_params(lead, trail)
    perms = random_permutations(jax.random.key(1), spec)
    received = permute_params(spec, perms, params)
    for before, after in zip(slices(params, lead, trail), slices(received, lead, trail), strict=True):
        assert_same(permute_params(spec, perms, before), after)


def slices(tree, lead, trail):
    """The networks of a batch, and the features of each, one by one."""
    for batch, feature in itertools.product(np.ndindex(*lead), np.ndindex(*trail)):
        yield jax.tree.map(lambda x: np.asarray(x)[(*batch, ..., *feature)], tree)  # noqa: B023


def test_feature_axis_says_which_axis_is_which():
    spec, params = mlp_spec([3, 3, 3]), mlp_params([3, 3, 3], lead=(3,))
    perms = {"hidden_1": np.array([1, 2, 0], np.int32)}
    as_batch = permute_params(spec, perms, params)
    np.testing.assert_array_equal(as_batch["layer_0"]["bias"], params["layer_0"]["bias"][:, [1, 2, 0]])
    as_features = permute_params(spec, perms, params, feature_axis=True)
    np.testing.assert_array_equal(as_features["layer_0"]["bias"], params["layer_0"]["bias"][[1, 2, 0]])


def test_one_permutation_after_another_is_their_composition():
    params = mlp_params()
    p, q = (random_permutations(jax.random.key(i), SPEC) for i in (1, 2))
    both = permute_params(SPEC, q, permute_params(SPEC, p, params))
    assert_same(both, permute_params(SPEC, {id: p[id][q[id]] for id in p}, params))
    inverse = {id: jnp.argsort(perm).astype(jnp.int32) for id, perm in p.items()}
    assert_same(permute_params(SPEC, inverse, permute_params(SPEC, p, params)), params)


def test_the_inverse_of_dependent_permutations():
    """The places of `inner` are those where the heads stand, so that its inverse is in the order of the old heads."""
    spec, params = heads_spec(), heads_params()
    perms = {id: np.asarray(p) for id, p in random_permutations(jax.random.key(7), spec).items()}
    back = {id: np.argsort(perms[id]).astype(np.int32) for id in ("heads", "own_0", "own_1")}
    back["inner"] = np.argsort(perms["inner"], axis=-1)[back["heads"]].astype(np.int32)
    assert_same(permute_params(spec, back, permute_params(spec, perms, params)), params)


def test_ids_left_out_stay_in_place():
    params = mlp_params()
    assert_same(permute_params(SPEC, {}, params), params)
    perm = np.array([2, 0, 1], np.int32)
    received = permute_params(SPEC, {"hidden_2": perm}, params)
    assert_same(received, by_hand({"hidden_1": np.arange(5), "hidden_2": perm}, params))
    spec, params = heads_spec(), heads_params()
    received = permute_params(spec, {"heads": perm}, params)
    np.testing.assert_array_equal(received["a"], params["a"][perm])
    np.testing.assert_array_equal(received["d"].reshape(2, 3, 4), params["d"].reshape(2, 3, 4)[:, perm])


def test_under_jit_and_vmap_over_keys():
    params = mlp_params()

    def shuffled(key, p):
        return permute_params(SPEC, random_permutations(key, SPEC), p)

    keys = jax.random.split(jax.random.key(0), 4)
    received = jax.jit(jax.vmap(shuffled, in_axes=(0, None)))(keys, params)
    for i in range(4):
        one = jax.tree.map(lambda x: x[i], received)  # noqa: B023
        assert_same(one, by_hand(random_permutations(keys[i], SPEC), params))


def test_trees_of_classes_keep_them_and_their_integers():
    class Net(eqx.Module):
        layers: list
        steps: jax.Array

    keys = jax.random.split(jax.random.key(0), 2)
    net = Net([eqx.nn.Linear(2, 3, key=keys[0]), eqx.nn.Linear(3, 2, key=keys[1])], jnp.arange(3))
    spec = infer_spec(net)
    received = permute_params(spec, {"hidden_1": np.array([2, 0, 1], np.int32)}, net)
    assert isinstance(received, Net)
    np.testing.assert_array_equal(received.steps, net.steps)
    np.testing.assert_array_equal(received.layers[0].weight, net.layers[0].weight[np.array([2, 0, 1])])
    np.testing.assert_array_equal(received.layers[1].weight, net.layers[1].weight[:, np.array([2, 0, 1])])


def test_dtypes_are_kept():
    params = mlp_params()
    params["layer_1"] = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params["layer_1"])
    received = permute_params(infer_spec(params), random_permutations(jax.random.key(0), SPEC), params)
    assert jax.tree.map(lambda x: x.dtype, received) == jax.tree.map(lambda x: x.dtype, params)


@pytest.mark.parametrize(
    ("spec", "perms", "message"),
    [
        (
            SPEC,
            {"hidden_9": np.arange(5, dtype=np.int32)},
            r"unknown id 'hidden_9'; the spec has hidden_1, hidden_2, input",
        ),
        (SPEC, {"input": np.arange(2, dtype=np.int32)}, "id 'input' is pinned"),
        (
            SPEC,
            {"hidden_1": np.arange(3, dtype=np.int32)},
            r"'hidden_1': expected an index array of shape \(5,\).*\(3,\)",
        ),
        (SPEC, {"hidden_1": np.zeros((2, 5), np.int32)}, r"expected an index array of shape \(5,\), received \(2, 5\)"),
        (heads_spec(), {"inner": np.zeros(4, np.int32)}, r"'inner': expected an index array of shape \(3, 4\)"),
        (
            heads_spec(),
            {"flat": np.arange(12, dtype=np.int32)},
            "'flat' moves as heads, inner do: give the permutations",
        ),
    ],
)
def test_permutations_that_do_not_fit_the_spec_are_refused(spec, perms, message):
    params = mlp_params() if spec is SPEC else heads_params()
    with pytest.raises(ValueError, match=message):
        permute_params(spec, perms, params)


def test_parameters_of_another_architecture_are_refused():
    perms = random_permutations(jax.random.key(0), SPEC)
    with pytest.raises(ValueError, match=r"layer_0/bias: expected shape \(5,\)"):
        permute_params(SPEC, perms, mlp_params((2, 6, 3, 4)))
    with pytest.raises(ValueError, match="is missing"):
        permute_params(SPEC, perms, {})


def test_a_spec_built_again_does_not_compile_again():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def shuffled(spec, key, params):
        traces.append(spec)
        return permute_params(spec, random_permutations(key, spec), params)

    shuffled(SPEC, jax.random.key(0), mlp_params())
    shuffled(mlp_spec(SIZES), jax.random.key(1), mlp_params(seed=1))
    shuffled(dataclasses.replace(SPEC, treedef=None), jax.random.key(1), mlp_params(seed=2))
    assert len(traces) == 1


# -- augmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lead", "trail"), [((), ()), ((4,), ()), ((2, 3), ()), ((), (2,)), ((3,), (2,))])
def test_each_network_is_permuted_by_what_its_own_key_draws(lead, trail):
    spec, params, key = heads_spec(), heads_params(lead, trail), jax.random.key(0)
    received = permute_randomly(key, spec, params)
    keys = jax.random.split(key, lead) if lead else key
    drawn = set()
    for i in np.ndindex(*lead):
        perms = random_permutations(keys[i] if lead else key, spec)
        drawn.add(tuple(np.asarray(perms["twice"]).tolist()))
        one = jax.tree.map(lambda x: x[i], params)  # noqa: B023
        assert_same(jax.tree.map(lambda x: x[i], received), permute_params(spec, perms, one))  # noqa: B023
    assert len(drawn) == math.prod(lead)


def test_augmentation_under_jit_and_vmap():
    params, keys = mlp_params(lead=(3, 2)), jax.random.split(jax.random.key(1), 3)
    received = jax.jit(jax.vmap(lambda key, p: permute_randomly(key, SPEC, p)))(keys, params)
    for i in range(3):
        one = permute_randomly(keys[i], SPEC, jax.tree.map(lambda x: x[i], params))  # noqa: B023
        assert_same(jax.tree.map(lambda x: x[i], received), one)  # noqa: B023


def test_augmentation_leaves_integers_alone_and_refuses_other_architectures():
    params = {**mlp_params(lead=(3,)), "steps": jnp.arange(5)}
    spec = infer_spec({**mlp_params(), "steps": jnp.arange(5)})
    received = permute_randomly(jax.random.key(0), spec, params)
    np.testing.assert_array_equal(received["steps"], params["steps"])
    assert (np.asarray(received["layer_1"]["bias"]) != params["layer_1"]["bias"]).any()
    with pytest.raises(ValueError, match=r"layer_0/bias: expected shape \(5,\)"):
        permute_randomly(jax.random.key(0), SPEC, mlp_params((2, 6, 3, 4)))
