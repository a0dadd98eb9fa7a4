"""The graph that an optimizer reads of a pytree: inferred, given, and where there is none."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ngjax
from ngjax.optimizers import ng_learned_opt
from ngjax.optimizers.features import SCALAR_FEATURES
from ngjax.optimizers.graph_rules import with_constant_edges
from ngjax.optimizers.named_rules import ng_gnn_rule
from ngjax.optimizers.parts import inferred_spec, list_spec
from tests.optimizers.small import (
    GRADIENTS,
    PARAMS,
    RULES,
    SPEC,
    assert_close,
    drawn_meta_params,
    meta_params,
    run,
    updates,
)


def test_without_a_spec_the_graph_is_inferred():
    optimizer = ng_learned_opt(RULES["ng-gnn"], meta_params=meta_params("ng-gnn"), spec=SPEC)
    assert_close(run(optimizer, PARAMS, GRADIENTS)[0], updates("ng-gnn"))


@pytest.mark.parametrize("name", ["ng-gnn", "lstm"])
def test_a_spec_of_all_variables_is_one_of_the_params_of_linen(name):
    def apply(variables, x):
        statistics, layers = variables["batch_stats"], [variables["params"][f"layer_{i}"] for i in range(2)]
        x = jax.nn.relu(x @ layers[0]["kernel"] + layers[0]["bias"] - statistics["mean"])
        return x @ layers[1]["kernel"] + layers[1]["bias"]

    variables = {"params": PARAMS, "batch_stats": {"mean": np.zeros(8, np.float32)}}
    spec = ngjax.trace_spec(apply, variables, np.ones((1, 4), np.float32))
    optimizer = ng_learned_opt(RULES[name], meta_params=meta_params(name), spec=spec)
    expected, _ = run(optimizer, {"params": PARAMS}, [{"params": gradient} for gradient in GRADIENTS[:1]])
    assert_close(updates(name, GRADIENTS[:1], spec=spec), expected["params"])


def test_the_spec_tells_lstm_the_order_of_the_layers():
    def renamed(tree):
        return {"stem": tree["layer_0"], "head": tree["layer_1"]}  # head comes first by name

    def apply(params, x):
        x = jax.nn.relu(x @ params["stem"]["kernel"] + params["stem"]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    spec = ngjax.trace_spec(apply, renamed(PARAMS), np.ones((1, 4), np.float32))
    optimizer = ng_learned_opt(RULES["lstm"], meta_params=meta_params("lstm"), spec=spec, step="paper")
    found = run(optimizer, renamed(PARAMS), [renamed(gradient) for gradient in GRADIENTS])[0]
    assert_close(found, renamed(updates("lstm", step="paper")))


def test_scalars_without_a_place_in_the_graph_get_the_learned_vector():
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["layer_0"]["kernel"] + params["layer_0"]["bias"])
        return (hidden @ params["layer_1"]["kernel"] + params["layer_1"]["bias"]) * params["temperature"]

    params = {**PARAMS, "temperature": np.ones((), np.float32)}
    spec, theta = ngjax.trace_spec(apply, params, np.ones((1, 4), np.float32)), meta_params("ng-gnn")
    assert len(spec.loose) == 1
    first, second = (
        run(ng_learned_opt(RULES["ng-gnn"], meta_params=given, spec=spec, step="paper"), params, [params])[0]
        for given in ({**theta, "loose": np.full(8, size, np.float32)} for size in (0, 1))
    )
    assert abs(first.pop("temperature") - second.pop("temperature")) > 1e-4
    assert_close(first, second, tolerance=0)


def test_what_has_no_graph_is_updated_one_by_one_with_one_warning():
    inferred_spec.cache_clear()
    optimizer = ng_learned_opt(RULES["ng-gnn"], meta_params=meta_params("ng-gnn"))
    strange = {"temperature": np.ones(3, np.float32), "table": np.ones((4, 2, 5), np.float32)}
    with pytest.warns(UserWarning, match=r"43 parameters .*spec=ngjax.trace_spec"):
        state = optimizer.init(strange)
    found, _ = optimizer.update(strange, state, strange)  # where a warning would be an error
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(found))


FORMS = {
    # The name of a matrix, and a pytree of matrices and biases.
    "Dense_{}/kernel": lambda layers: {f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(layers)},
    "{}/0": lambda layers: [(w, b) for w, b in layers],
    "{}/W": lambda layers: [{"W": w, "b": b} for w, b in layers],
    "W{}": lambda layers: {f"{name}{i}": x for i, (w, b) in enumerate(layers) for name, x in (("W", w), ("b", b))},
}


def three_layers():
    return [[np.ones(shape, np.float32), np.ones(shape[1], np.float32)] for shape in ((5, 4), (4, 4), (4, 3))]


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_of_plain_pytrees_is_inferred(form):
    inferred_spec.cache_clear()
    layers = FORMS[form](three_layers())
    # Where none could be, a warning would be an error.
    ng_learned_opt(RULES["ng-gnn"], meta_params=meta_params("ng-gnn")).init(layers)
    assert inferred_spec.cache_info().misses == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("missing", [optax.MaskedNode(), None])
@pytest.mark.parametrize(("number", "is_gap"), [(0, False), (1, True), (2, False)])
def test_no_graph_is_inferred_over_a_gap(number, is_gap, missing, form):
    inferred_spec.cache_clear()
    layers = three_layers()
    layers[number] = [missing, missing]
    optimizer = ng_learned_opt(RULES["ng-gnn"], meta_params=meta_params("ng-gnn"))
    match = f"{form.format(number)} is masked or None, and there are parameters before and behind"
    with pytest.warns(UserWarning, match=match) if is_gap else contextlib.nullcontext():
        optimizer.init(FORMS[form](layers))


def test_the_value_of_nnx_variables_may_be_shown_or_hidden():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = np.ones((5, 3), np.float32)
    spec = ngjax.trace_spec(lambda params, x: nnx.merge(graph, params, rest)(x), params, x)
    learned = {"meta_params": meta_params("ng-gnn"), "learning_rate": 0.1}
    before, after = jax.tree.leaves(params), []
    for options in ({"spec": spec}, {}):
        trained = nnx.clone(model)
        optimizer = nnx.Optimizer(trained, ng_learned_opt(RULES["ng-gnn"], **options, **learned), wrt=nnx.Param)
        optimizer.update(trained, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(trained))
        after.append(jax.tree.leaves(nnx.state(trained, nnx.Param)))
    for found, inferred, start in zip(*after, before, strict=True):
        assert np.any(found != start)
        np.testing.assert_allclose(found, inferred, rtol=1e-5)


def test_the_graph_tells_scalars_with_the_same_features_apart():
    # All weights of the first layer have the same features, but one neuron's next weights have another gradient.
    params = jax.tree.map(np.ones_like, PARAMS)
    gradient = jax.tree.map(np.copy, params)
    gradient["layer_1"]["kernel"][0] = 5.0
    for name, rule in {"ff": RULES["ff"], "ng-gnn": ng_gnn_rule(8, num_layers=2, num_hidden=1)}.items():
        # The paper's step, as orthogonalizing makes rounding as large as what this is about.
        theta = drawn_meta_params(rule)
        optimizer = ng_learned_opt(rule, meta_params=theta, spec=SPEC, step="paper")
        first, second, *_ = run(optimizer, params, [gradient])[0]["layer_0"]["kernel"][0, 0]
        assert (abs(first - second) > 1e-6) == (name == "ng-gnn")


RESIDUAL_SHAPES = {"a": (3, 6), "b": (6, 6), "c": (6, 2)}


def residual_network(params, x):
    hidden = jax.nn.relu(x @ params["a"])
    return (hidden + jax.nn.relu(hidden @ params["b"])) @ params["c"]


def test_residual_connections_are_edges_without_gradients():
    rng = np.random.default_rng(0)
    params, gradient = (
        {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in RESIDUAL_SHAPES.items()} for _ in range(2)
    )
    spec = ngjax.trace_spec(residual_network, params, np.ones((1, 3), np.float32))
    assert any(group.view is None for group in spec.edge_groups)
    optimizer = ng_learned_opt(RULES["ng-gnn"], spec=spec, meta_params=meta_params("ng-gnn"))
    found = run(optimizer, params, [gradient])[0]
    moves = ngjax.random_permutations(jax.random.key(1), spec)
    permuted = [ngjax.permute_params(spec, moves, tree) for tree in (params, gradient)]
    moved = run(optimizer, permuted[0], [permuted[1]])[0]
    expected = ngjax.permute_params(spec, moves, jax.tree.map(lambda leaf: leaf[0], found))
    assert_close(jax.tree.map(lambda leaf: leaf[0], moved), expected)


def test_residual_connections_are_weights_of_one_without_gradients():
    reads, shapes = SCALAR_FEATURES, RESIDUAL_SHAPES
    ones = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    traced = ngjax.trace_spec(residual_network, ones, np.ones((1, 3), np.float32))
    spec = list_spec(traced, tuple(param.path for param in traced.params), tuple(shapes.values()))
    read = [np.full((*shape, reads.size), 7, np.float32) for shape in shapes.values()]
    graph = with_constant_edges(spec, ngjax.to_groups(spec, read, feature_axis=True), reads)
    skips = [edge for group, edge in zip(spec.edge_groups, graph.edges, strict=True) if group.view is None]
    assert len(skips) == sum(group.view is None for group in traced.edge_groups) > 0
    expected = [0, 1, *[-1, 0] * 6]  # logarithm and sign of one, then of zeros
    for edge in skips:
        np.testing.assert_allclose(edge, np.broadcast_to(np.float32(expected), edge.shape), atol=1e-6)
