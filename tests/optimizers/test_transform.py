"""What `optax` and JAX ask of a transformation, for every rule."""

import collections
import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import ngjax
from ngjax import train
from ngjax.optimizers import GraphRule, init_meta_params, ng_learned_opt
from ngjax.optimizers.parts import inferred_spec
from tests.optimizers.small import (
    PARAMS,
    RULES,
    SPEC,
    assert_close,
    learned_opt,
    meta_params,
    normal,
    run,
    scan_steps,
    stacked,
)

# What concerns the transformation and not the rule is tried with one rule on tensors and one on graphs: compiling is
# most of the cost. A scan inside `chain`, donation, explicit shardings, permutations and numbers are tried with all.
FEW = ("ff", "ng-gnn")
TESTED_WITH_FEW = (
    "test_a_spec_may_have_more_than_the_tree",
    "test_vmap_over_optimizees",
    "test_bfloat16_rounds_only_the_result",
    "test_gradients_may_be_more_precise_than_parameters",
    "test_replicated_gradients_of_parameters_with_explicit_shardings_and_chunks",
    "test_saved_and_restored",
    "test_leaves_that_are_no_floating_arrays_are_named",
)


def pytest_generate_tests(metafunc):
    if metafunc.function is test_inside_other_transformations:
        pairs = [(row, name) for row in CONTRACT for name in (RULES if row == "chain" else FEW)]
        metafunc.parametrize(("row", "name"), pairs)
    elif metafunc.function is test_sharded_parameters:
        pairs = [*((AxisType.Explicit, name) for name in RULES), *((AxisType.Auto, name) for name in FEW)]
        metafunc.parametrize(("kind", "name"), pairs)
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", FEW if metafunc.function.__name__ in TESTED_WITH_FEW else RULES)


GRADIENTS = [normal(1 + t, scale=10.0**-t) for t in range(3)]


def assert_same_structure(ours, expected):
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (ours, expected)]
    assert shapes[0] == shapes[1]


def is_finite(tree):
    return all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(tree))


# -- inside other transformations -------------------------------------------------------------------------------------


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: np.float32(factor) * leaf, tree)


def updates_of(optimizer, gradients=GRADIENTS):
    """The updates of all steps, one tree each."""
    updates = run(optimizer, PARAMS, gradients)[0]
    return [jax.tree.map(lambda leaf, t=t: leaf[t], updates) for t in range(len(gradients))]


def part(tree):
    return {"layer_0": tree["layer_0"]}


def updates_of_part(optimizer):
    updates = run(optimizer, part(PARAMS), [part(gradient) for gradient in GRADIENTS])[0]
    return [jax.tree.map(lambda leaf, t=t: leaf[t], updates) for t in range(len(GRADIENTS))]


MEAN = jax.tree.map(lambda a, b: (a + b) / 2, *GRADIENTS[:2])
NOT_FINITE = scaled(PARAMS, np.nan)

CONTRACT = {
    # Name: the transformation around a learned one, the gradients it gets, the updates that are expected.
    "chain": (
        lambda tx: optax.chain(
            optax.scale(2.0),
            tx,
            optax.scale_by_schedule(lambda count: 1 / (1 + count)),
            optax.add_decayed_weights(-0.1),
        ),
        GRADIENTS,
        lambda tx: [
            jax.tree.map(lambda u, p, t=t: u / np.float32(1 + t) - np.float32(0.1) * p, u, PARAMS)
            for t, u in enumerate(updates_of(tx, [scaled(g, 2) for g in GRADIENTS]))
        ],
    ),
    "masked": (
        lambda tx: optax.masked(tx, {"layer_0": True, "layer_1": False}),
        GRADIENTS,
        lambda tx: [{**g, **u} for g, u in zip(GRADIENTS, updates_of_part(tx), strict=True)],
    ),
    "multi_transform": (
        lambda tx: optax.multi_transform(
            {"learned": tx, "sgd": optax.sgd(0.5)}, {"layer_0": "learned", "layer_1": "sgd"}
        ),
        GRADIENTS,
        lambda tx: [{**scaled(g, -0.5), **u} for g, u in zip(GRADIENTS, updates_of_part(tx), strict=True)],
    ),
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        GRADIENTS[:2],
        lambda tx: [scaled(PARAMS, 0), updates_of(tx, 3 * [MEAN])[0]],
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 5),
        [GRADIENTS[0], NOT_FINITE, GRADIENTS[1]],
        lambda tx: [(u := updates_of(tx))[0], scaled(PARAMS, 0), u[1]],
    ),
    "inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(
            scale=optax.linear_schedule(0.0, 1.0, 2)
        ),
        GRADIENTS,
        lambda tx: [scaled(u, t / 2) for t, u in enumerate(updates_of(tx))],
    ),
}


def test_inside_other_transformations(name, row):
    wrap, gradients, expected = CONTRACT[row]
    # MultiSteps divides by an integer.
    with jax.numpy_dtype_promotion("standard" if row == "MultiSteps" else "strict"):
        updates = updates_of(wrap(learned_opt(name)), gradients)
    assert_close(updates, expected(learned_opt(name)))


def test_a_spec_may_have_more_than_the_tree(name):
    without = {"layer_1": {"kernel": optax.MaskedNode(), "bias": None}}
    optimizer = ng_learned_opt(RULES[name], spec=SPEC, meta_params=meta_params(name))
    params, gradient = ({**tree, **without} for tree in (PARAMS, GRADIENTS[0]))
    updates, state = run(optimizer, params, [gradient])
    assert_same_structure(updates, stacked([params]))
    assert_close(part(updates), run(optimizer, part(PARAMS), [part(GRADIENTS[0])])[0])
    assert len(jax.tree.leaves(state.momenta)) == 5 * 2


def test_trees_without_leaves_and_leaves_without_elements(name):
    optimizer = learned_opt(name)
    for given in (optimizer, ng_learned_opt(RULES[name], spec=SPEC, meta_params=meta_params(name))):
        assert given.update({}, given.init({}), {})[0] == {}
        # Calls init with a placeholder, which has no leaves.
        changed = optax.tree.map_params(given, lambda leaf: leaf + 1, given.init(PARAMS))
        assert changed.count == 0
        assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(changed.momenta))
    inferred_spec.cache_clear()
    tree = {"a": np.zeros((0, 3), np.float32), "b": np.ones((), np.float32), "c": None}
    reads_graphs = isinstance(RULES[name], GraphRule)
    with pytest.warns(UserWarning, match="1 parameters .* one by one") if reads_graphs else contextlib.nullcontext():
        updates, state = run(optimizer, tree, [tree])
    assert_same_structure(updates, stacked([tree]))
    assert is_finite((updates, state))


# -- under JAX's transformations ---------------------------------------------------------------------------------------


def test_loop_with_donated_arrays_compiles_once_and_is_the_scan(name):
    optimizer = learned_opt(name)
    traces = []

    def step(params, state, gradients):
        traces.append(None)
        updates, state = optimizer.update(gradients, state, params, loss=0.0, unknown=None)
        return params, updates, state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = optimizer.init(params)
    all_updates = []
    for gradients in GRADIENTS:
        before = (params, state)
        params, updates, state = donating(params, state, gradients)
        all_updates.append(updates)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert len(traces) == 1
    assert state.count == 3
    assert_close((stacked(all_updates), state), run(optimizer, PARAMS, GRADIENTS))


def test_vmap_over_optimizees(name):
    optimizees = [(PARAMS, GRADIENTS), (normal(8, scale=0.1), GRADIENTS[::-1])]
    stacks = stacked([(params, stacked(gradients)) for params, gradients in optimizees])
    both = jax.vmap(functools.partial(scan_steps, learned_opt(name)))(*stacks)
    expected = [run(learned_opt(name), *optimizee) for optimizee in optimizees]
    assert_close(both, stacked(expected))


SHARDED = {"kernel": jax.P("data", "model"), "bias": jax.P("model")}


def placed(tree, mesh, layouts):
    def place(path, leaf):
        return jax.device_put(leaf, NamedSharding(mesh, layouts[path[-1].key]))

    return jax.tree.map_with_path(place, tree)


def test_sharded_parameters(name, kind):
    optimizer = learned_opt(name)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        params, gradients = (placed(tree, mesh, SHARDED) for tree in (PARAMS, GRADIENTS[0]))
        state = optimizer.init(params)
        updates, new_state = jax.jit(optimizer.update)(gradients, state, params)
    carries = [] if state.carry is None else [state.carry, new_state.carry]
    for tree in (updates, *state.momenta, *new_state.momenta, *carries):
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            expected = NamedSharding(mesh, jax.P(*theirs.sharding.spec, *(None,) * (ours.ndim - theirs.ndim)))
            assert ours.sharding.is_equivalent_to(expected, ours.ndim)
    assert_close(updates, updates_of(optimizer)[0])
    assert_close(new_state.momenta, 5 * (GRADIENTS[0],))


def test_replicated_gradients_of_parameters_with_explicit_shardings_and_chunks(name):
    optimizer = ng_learned_opt(RULES[name], meta_params=meta_params(name), chunk=4)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    with jax.set_mesh(mesh):
        params = placed(PARAMS, mesh, SHARDED)
        gradients = placed(GRADIENTS[0], mesh, {"kernel": jax.P(), "bias": jax.P()})
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    assert_close(updates, updates_of(learned_opt(name))[0])


def test_saved_and_restored(name, tmp_path):
    optimizer = learned_opt(name)
    before = jax.tree.map(jnp.asarray, run(optimizer, PARAMS, GRADIENTS)[1])
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, before)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), before)
    after = checkpoints.restore(3, abstract)
    checkpoints.close()
    assert_close(after, before, tolerance=0)
    assert_same_structure(after, before)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_permuting_neurons_permutes_updates(name):
    permutations = ngjax.random_permutations(jax.random.key(3), SPEC)
    params, *gradients = (ngjax.permute_params(SPEC, permutations, tree) for tree in (PARAMS, *GRADIENTS))
    expected = [ngjax.permute_params(SPEC, permutations, update) for update in updates_of(learned_opt(name))]
    assert_close(run(learned_opt(name), params, gradients)[0], stacked(expected))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def test_bfloat16_rounds_only_the_result(name):
    dtype = jnp.bfloat16
    params, gradients = cast((PARAMS, GRADIENTS), dtype)
    updates, state = run(learned_opt(name), params, gradients)
    expected, expected_state = run(learned_opt(name), *cast((params, gradients), jnp.float32))
    assert_same_structure((updates, state), (cast(expected, dtype), expected_state))
    assert_close(state, expected_state)
    assert_close(updates, expected, float(jnp.finfo(dtype).eps))


def test_gradients_may_be_more_precise_than_parameters(name):
    params = cast(PARAMS, jnp.bfloat16)
    assert_same_structure(run(learned_opt(name), params, GRADIENTS)[0], cast(stacked(GRADIENTS), jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_gradients_give_finite_updates(name, dtype):
    signs = stacked([jax.tree.map(np.sign, gradient) for gradient in GRADIENTS])
    for size in (0.0, 1e-30, 1e-12, 1e12, 1e30):
        gradients = cast(scaled(signs, size), dtype)
        one_after_the_other = [jax.tree.map(lambda leaf, t=t: leaf[t], gradients) for t in range(3)]
        assert is_finite(run(learned_opt(name), cast(PARAMS, dtype), one_after_the_other))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_show_in_the_updates(name, value):
    gradients = [jax.tree.map(np.copy, gradient) for gradient in GRADIENTS]
    for leaf in jax.tree.leaves(gradients):
        leaf[0] = value
    updates, _ = run(learned_opt(name), PARAMS, gradients)
    assert not any(np.any(np.isfinite(leaf[:, 0])) for leaf in jax.tree.leaves(updates))


# -- bad input ---------------------------------------------------------------------------------------------------------


def without_bias(tree):
    return {**tree, "layer_1": {"kernel": tree["layer_1"]["kernel"]}}


def transposed(tree):
    return {**tree, "layer_0": {**tree["layer_0"], "kernel": tree["layer_0"]["kernel"].T}}


def with_new_leaf(tree):
    return {**tree, "new": jnp.zeros(3)}


BAD_UPDATES = {
    # What comes as gradients and parameters after `init(PARAMS)`, and what the message says.
    "no params": (lambda g, p: (g, None), ValueError, "argument params is missing"),
    "no gradient": (
        lambda g, p: (without_bias(g), p),
        ValueError,
        r"gradient layer_1/bias: expected shape \(2,\), as init saw it, received no such leaf",
    ),
    "gradient of another shape": (
        lambda g, p: (transposed(g), p),
        ValueError,
        r"gradient layer_0/kernel: expected shape \(4, 8\), .* received shape \(8, 4\)",
    ),
    "new leaf": (
        lambda g, p: (with_new_leaf(g), with_new_leaf(p)),
        ValueError,
        r"gradient new: expected no such leaf, .* received shape \(3,\)",
    ),
    "other params": (
        lambda g, p: (g, without_bias(p)),
        ValueError,
        r"parameter layer_1/bias: expected shape \(2,\)",
    ),
    "integer gradient": (
        lambda g, p: ({**g, "layer_0": jax.tree.map(lambda leaf: leaf.astype(jnp.int32), g["layer_0"])}, p),
        TypeError,
        r"gradient layer_0/bias: expected a real floating array, received int32\[8\]",
    ),
}


@pytest.mark.parametrize("row", BAD_UPDATES)
def test_bad_updates(name, row):
    change, error, message = BAD_UPDATES[row]
    gradients, params = change(GRADIENTS[0], PARAMS)
    with pytest.raises(error, match=message):
        learned_opt(name).update(gradients, learned_opt(name).init(PARAMS), params)


@pytest.mark.parametrize("leaf", [jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.complex64), jax.random.key(0), 1.5, "text"])
def test_leaves_that_are_no_floating_arrays_are_named(name, leaf):
    with pytest.raises(TypeError, match="parameter a/1: expected a real floating array, received"):
        learned_opt(name).init({"a": [jnp.zeros(2), leaf]})


def test_spec_that_does_not_fit(name):
    optimizer = ng_learned_opt(RULES[name], spec=SPEC, meta_params=meta_params(name))
    with pytest.raises(
        ValueError,
        match=r"parameter new \(3,\) is not part of the spec, which has layer_0/bias, layer_0/kernel, .* and 1 more",
    ):
        optimizer.init(with_new_leaf(PARAMS))
    with pytest.raises(
        ValueError, match=r"parameter layer_0/kernel: the spec expects shape \(4, 8\), received \(8, 4\)"
    ):
        optimizer.init(transposed(PARAMS))


def test_names_that_join_to_the_same_are_updated_without_a_graph():
    tree = {"a/kernel": np.ones((2, 3), np.float32), "a": {"kernel": np.ones((3, 2), np.float32)}}
    with pytest.warns(UserWarning, match="12 parameters .* two parameters have the same name"):
        updates, _ = run(learned_opt("ng-gnn"), tree, [tree])
    assert is_finite(updates)


def test_a_network_too_large_for_ng_t_is_refused_at_once():
    sizes = (784, 4000, 4000, 10)
    tree = {
        f"layer_{i}": {
            "kernel": jax.ShapeDtypeStruct(ends, jnp.float32),
            "bias": jax.ShapeDtypeStruct(ends[1:], jnp.float32),
        }
        for i, ends in enumerate(itertools.pairwise(sizes))
    }
    with pytest.raises(ValueError, match=r"all pairs of 8,795 nodes: about .* GB .* use NG-GNN"):
        jax.eval_shape(learned_opt("ng-t").init, tree)


def test_bad_meta_params(name):
    rule, theta = RULES[name], meta_params(name)
    head = theta["head"]
    other = {"ff": "lstm", "ng-gnn": "ng-t", "ng-t": "ng-gnn", "nfn": "ng-gnn"}.get(name, "ff")

    def using(changed):
        return ng_learned_opt(rule, meta_params=changed)

    with pytest.raises(ValueError, match=f"a {type(rule).__name__} needs meta_params=, .* by the name of their rule"):
        ng_learned_opt(rule)
    with pytest.raises(
        ValueError, match=r"meta-parameter head/dense_0/kernel of \w+: expected shape \(\d+, 8\), received"
    ):
        using({**theta, "head": {**head, "dense_0": {**head["dense_0"], "kernel": jnp.zeros((2, 2))}}})
    with pytest.raises(ValueError, match="meta-parameter|has no meta-parameters"):
        using(meta_params(other))
    with pytest.raises(ValueError, match=r"has no meta-parameters extra"):
        using({**theta, "extra": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"expected shape .*, received none; there are none at all"):
        using({})
    with pytest.raises(TypeError, match=r"meta-parameter \w.* received int32"):
        using(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), theta))
    with pytest.raises(
        ValueError, match=r"unknown rule 'adam'; known are ff, lstm, ng-gnn, ng-t, nfn, celo2, coordinatewise-lstm"
    ):
        ng_learned_opt("adam")
    with pytest.raises(
        ValueError, match=r"unknown rule 'adam'; known are ff, lstm, ng-gnn, ng-t, nfn, celo2, coordinatewise-lstm"
    ):
        init_meta_params(jax.random.key(0), "adam")


def test_gradients_in_another_order_are_refused():
    turned = collections.OrderedDict((layer, GRADIENTS[0][layer]) for layer in ("layer_1", "layer_0"))
    with pytest.raises(ValueError, match="gradients: expected the containers that init saw"):
        learned_opt("ff").update(turned, learned_opt("ff").init(PARAMS), PARAMS)


def test_integer_parameters_of_the_spec_are_none_of_the_optimizer():
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["layer_0"]["kernel"] + params["layer_0"]["bias"])
        return hidden @ params["layer_1"]["kernel"] + params["layer_1"]["bias"]

    params = {**PARAMS, "count": np.zeros(3, np.int32)}
    spec = ngjax.trace_spec(apply, params, np.ones((1, 4), np.float32))
    optimizer = ng_learned_opt(RULES["ng-gnn"], meta_params=meta_params("ng-gnn"), spec=spec)
    with pytest.raises(ValueError, match=r"parameter count \(3,\) is not part of the spec"):
        optimizer.init({**params, "count": np.zeros(3, np.float32)})
