"""What `ng_learned_opt` does with the numbers of a rule: forms of the step, learning rate, decay, clipping, dtype."""

import contextlib
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ngjax
from ngjax.optimizers import heads, init_meta_params, ng_learned_opt, shipped, steps
from ngjax.optimizers.named_rules import ng_gnn_rule
from ngjax.optimizers.parts import inferred_spec
from tests.optimizers.small import RULES, SPEC, assert_close, drawn_meta_params, meta_params, normal, run

PARAMS = normal(0)
GRADIENTS = [normal(1 + t) for t in range(3)]


def updates(name="ff", gradients=GRADIENTS, **options):
    optimizer = ng_learned_opt(RULES[name], meta_params=meta_params(name), **options)
    return run(optimizer, PARAMS, gradients)[0]


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: np.asarray(factor, np.float32) * leaf, tree)


def test_normalized_steps_have_a_root_mean_square_of_the_learning_rate_times_their_size():
    for leaf in jax.tree.leaves(updates(learning_rate=0.3)):
        sizes = np.sqrt(np.mean(np.square(leaf), axis=tuple(range(1, leaf.ndim))))
        expected = 0.3 if leaf.ndim == 2 else 0.3 * np.sqrt(16 / max(leaf.shape[1:]))  # the first axis is that of steps
        np.testing.assert_allclose(sizes, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((), 1), ((64,), 1), ((1, 64), 1), ((16, 4), 1), ((64, 16), 0.5), ((3, 3, 16, 4), 1), ((0, 4), 1)],
)
def test_steps_of_wide_layers_are_smaller(shape, size):
    assert steps.step_size(shape) == size


@pytest.mark.parametrize("name", RULES)
def test_fresh_meta_parameters_add_nothing_to_momentum(name):
    theta = init_meta_params(jax.random.key(0), RULES[name])
    nothing = jax.tree.map(jnp.zeros_like, theta)
    found, expected = (ng_learned_opt(RULES[name], meta_params=given, spec=SPEC) for given in (theta, nothing))
    jax.tree.map(np.testing.assert_array_equal, run(found, PARAMS, GRADIENTS)[0], run(expected, PARAMS, GRADIENTS)[0])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(theta))
    alone = ng_learned_opt(RULES[name], meta_params=theta, spec=SPEC, step="paper")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(alone, PARAMS, GRADIENTS)[0]))


def unit_rms(x):
    return x / np.sqrt(np.mean(np.square(x)))


def test_a_normalized_step_adds_the_learned_direction_to_momentum():
    # Of biases, which are not orthogonalized. The paper's step says what is learned: the exponent is nearly zero.
    paper, normalized = updates(step="paper"), updates(learning_rate=1.0)
    for layer in PARAMS:
        momentum = 0.0
        for step, gradient in enumerate(GRADIENTS):
            momentum = 0.9 * momentum + gradient[layer]["bias"]
            nominal = unit_rms(gradient[layer]["bias"] + 0.9 * momentum)
            learned = 0.1 * paper[layer]["bias"][step] / 0.01
            found = normalized[layer]["bias"][step]
            np.testing.assert_allclose(found, unit_rms(learned - nominal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "scale"), [((6, 4), 1), ((4, 6), 1e30), ((3, 3, 7, 5), 1), ((2, 4, 8), 1e-30), ((5, 5), 1)]
)
def test_matrices_are_orthogonalized(shape, scale):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    longest = shape.index(max(shape))

    def matrix(x):
        return np.moveaxis(x, longest, -1).reshape(-1, shape[longest])

    found = np.asarray(jax.jit(steps.orthogonalized)(np.float32(scale) * x))
    left, values, right = np.linalg.svd(matrix(x), full_matrices=False)
    coordinates = left.T @ matrix(found) @ right.T
    # Singular vectors stay, singular values come near one.
    np.testing.assert_allclose(coordinates, np.diag(np.diag(coordinates)), atol=1e-3)
    assert np.all((np.diag(coordinates) > 0.6) & (np.diag(coordinates) < 1.25))
    assert np.ptp(values) > 0.5


@pytest.mark.parametrize("shape", [(), (3,), (1, 5), (0, 4)])
def test_what_is_no_matrix_is_not_orthogonalized(shape):
    x = jnp.ones(shape)
    np.testing.assert_array_equal(steps.orthogonalized(x), x)


def test_zeros_stay_zeros_when_orthogonalized():
    assert np.all(steps.orthogonalized(jnp.zeros((3, 2))) == 0)


def test_without_a_gradient_steps_are_zero_and_their_derivatives_finite():
    def step(head):
        return steps.normalized_step(head, jnp.zeros((3, 2)), [jnp.zeros((3, 2))] * 5)

    head = jnp.ones((3, 2, 2))
    assert np.all(step(head) == 0)
    assert np.all(np.isfinite(jax.grad(lambda head: jnp.sum(step(head)))(head)))


@pytest.mark.parametrize("name", ["ff", "ng-gnn"])
def test_scalars_without_any_gradient_stay_where_they_are(name):
    # A layer behind stop_gradient, and rows of a table that were not looked up: normalized, they would run away.
    without = [jax.tree.map(np.copy, gradient) for gradient in GRADIENTS]
    for gradient in without:
        gradient["layer_0"]["bias"][:] = 0
        gradient["layer_0"]["kernel"][1:] = 0
    without[1]["layer_0"]["kernel"][0] = 0  # had a gradient before, and goes on
    found = updates(name, without, learning_rate=0.3)["layer_0"]
    assert np.all(found["bias"] == 0)
    assert np.all(found["kernel"][:, 1:] == 0)
    size = 0.3 * steps.step_size(found["kernel"].shape[1:])
    np.testing.assert_allclose(np.sqrt(np.mean(found["kernel"][:, 0] ** 2, axis=1)), size, rtol=1e-5)


def test_learning_rates_may_be_schedules_of_the_steps_taken():
    fixed, falling = updates(learning_rate=1.0), updates(learning_rate=optax.linear_schedule(1.0, 0.0, 4))
    factors = 1 - np.arange(3) / 4
    assert_close(
        falling, jax.tree.map(lambda leaf: leaf * factors.reshape(-1, *[1] * (leaf.ndim - 1)), fixed), tolerance=1e-5
    )


def test_hyperparameters_may_be_injected():
    falling = optax.linear_schedule(1.0, 0.0, 4)
    inject = optax.inject_hyperparams(ng_learned_opt, static_args=("rule",))
    optimizer = inject(RULES["ff"], meta_params=meta_params("ff"), learning_rate=falling, weight_decay=0.1)
    found, state = run(optimizer, PARAMS, GRADIENTS)
    assert_close(found, updates(learning_rate=falling, weight_decay=0.1))
    assert state.hyperparams["learning_rate"] == 0.5


@pytest.mark.parametrize("step", ["normalized", "paper"])
def test_weight_decay_is_that_of_adamw(step):
    options = {"step": step, "learning_rate": 0.5}
    decayed, plain = updates(weight_decay=0.1, **options), updates(**options)
    assert_close(decayed, jax.tree.map(lambda u, p: u - np.float32(0.05) * p, plain, PARAMS))


@pytest.mark.parametrize("is_function", [False, True])
def test_weight_decay_may_be_of_some_leaves_only(is_function):
    mask = {"layer_0": {"kernel": True, "bias": False}, "layer_1": False}
    masked = updates(weight_decay=0.1, weight_decay_mask=(lambda params: mask) if is_function else mask)
    decayed, plain = updates(weight_decay=0.1), updates()
    kernel = masked["layer_0"].pop("kernel")
    assert_close(kernel, decayed["layer_0"].pop("kernel"), tolerance=0)
    assert_close(masked, {"layer_0": {"bias": plain["layer_0"]["bias"]}, "layer_1": plain["layer_1"]}, tolerance=0)


def test_a_function_of_the_mask_gets_the_parameters():
    seen = []
    optimizer = ng_learned_opt(
        RULES["ff"],
        meta_params=meta_params("ff"),
        weight_decay=0.1,
        weight_decay_mask=lambda tree: seen.append(tree) or True,
    )
    optimizer.update(GRADIENTS[0], optimizer.init(PARAMS), PARAMS)
    assert seen[0] is PARAMS


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_masks_that_cannot_be_are_refused(weight_decay):
    with pytest.raises(ValueError, match="weight_decay_mask: expected booleans in the structure of the parameters"):
        updates(weight_decay=weight_decay, weight_decay_mask={"layer_0": True})
    with pytest.raises(TypeError, match="weight_decay_mask: expected booleans, .* received 'no'"):
        updates(weight_decay=weight_decay, weight_decay_mask={"layer_0": True, "layer_1": "no"})


def test_a_mask_that_is_taken_for_a_schedule_is_refused():
    def are_matrices(params):
        return jax.tree.map(lambda leaf: np.ndim(leaf) > 1, params)

    inject = optax.inject_hyperparams(ng_learned_opt, static_args=("rule",))
    options = {"meta_params": meta_params("ff"), "weight_decay": 0.1, "weight_decay_mask": are_matrices}
    with pytest.raises(TypeError, match="not a single False; optax.inject_hyperparams takes functions for schedules"):
        run(inject(RULES["ff"], **options), PARAMS, GRADIENTS)
    static = optax.inject_hyperparams(ng_learned_opt, static_args=("rule", "weight_decay_mask"))
    expected = updates(weight_decay=0.1, weight_decay_mask=are_matrices)
    assert_close(run(static(RULES["ff"], **options), PARAMS, GRADIENTS)[0], expected)


def test_clipping_bounds_every_number_before_the_learning_rate():
    clipped, plain = updates(clip=0.5, learning_rate=2.0), updates(learning_rate=2.0)
    assert any(np.max(np.abs(leaf)) > 1 for leaf in jax.tree.leaves(plain))
    assert_close(clipped, jax.tree.map(lambda leaf: np.clip(leaf, -1, 1), plain))


@pytest.mark.parametrize("name", ["ff", "lstm", "ng-gnn", "ng-t", "coordinatewise-lstm"])
def test_computing_in_bfloat16_keeps_float32_state_and_is_near(name):
    # The paper's step is what the rule says and nothing else.
    exact = updates(name, step="paper")
    optimizer = ng_learned_opt(RULES[name], meta_params=meta_params(name), step="paper", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard" if name == "ng-t" else "strict"):  # flax's layer norm mixes dtypes
        rough, state = run(optimizer, PARAMS, GRADIENTS)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((rough, state.momenta, state.carry)))
    for a, b in zip(*map(jax.tree.leaves, (rough, exact)), strict=True):
        assert 0 < np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) < 0.03


@pytest.mark.parametrize("name", ["ff", "lstm", "ng-gnn", "coordinatewise-lstm"])
def test_chunks_change_nothing(name):
    # Chunks of five of the 32 scalars of a kernel: the last one is smaller.
    assert_close(updates(name, GRADIENTS[:1], chunk=5), updates(name, GRADIENTS[:1]))


def test_nor_do_they_change_meta_gradients():
    def loss(theta, chunk):
        optimizer = ng_learned_opt(RULES["ng-gnn"], meta_params=theta, chunk=chunk)
        found, _ = optimizer.update(GRADIENTS[0], optimizer.init(PARAMS), PARAMS)
        return sum(jnp.sum(jnp.sin(100 * leaf)) for leaf in jax.tree.leaves(found))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_close(gradient(meta_params("ng-gnn"), 5), gradient(meta_params("ng-gnn"), None))


def test_scalars_of_a_kernel_stay_together_in_a_chunk():
    rng = np.random.default_rng(0)
    features, backbone = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, 3, 2, 9, 4), (1, 3, 2, 1, 5)))
    seen = []

    def function(features, backbone):
        seen.append((features.shape, backbone.shape))
        return jnp.stack([jnp.sum(features, -1) * jnp.sum(backbone, -1), features[..., 0]], axis=-1)

    found = heads.in_chunks(function, 20, features, backbone)
    np.testing.assert_allclose(found, function(features, backbone), rtol=1e-5)
    assert seen[0] == ((9, 4), (1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "cosine"}, "unknown step 'cosine'; known are normalized, paper"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number of at least 0, received -0.1"),
        ({"clip": jnp.float32("nan")}, "clip: expected a number of at least 0, received nan"),
        ({"learning_rate": jnp.float32(-0.1)}, "learning_rate: expected a number of at least 0, received -0.1"),
        ({"chunk": 0}, "chunk: expected a number of scalars of at least 1, received 0"),
        ({"dtype": "int32"}, "dtype: expected a floating type that JAX computes in, as bfloat16; received int32"),
        ({"dtype": "float64"}, "dtype: .* received float64"),
        ({"learning_rate": jnp.ones(2)}, r"learning_rate: expected a number, received Array\(\[1., 1.\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ng_learned_opt(RULES["ff"], meta_params=meta_params("ff"), **options)


# -- graphs ------------------------------------------------------------------------------------------------------------


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


def test_residual_connections_are_edges_without_gradients():
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        return (hidden + jax.nn.relu(hidden @ params["b"])) @ params["c"]

    rng = np.random.default_rng(0)
    shapes = {"a": (3, 6), "b": (6, 6), "c": (6, 2)}
    params, gradient = (
        {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()} for _ in range(2)
    )
    spec = ngjax.trace_spec(apply, params, np.ones((1, 3), np.float32))
    assert any(group.view is None for group in spec.edge_groups)
    optimizer = ng_learned_opt(RULES["ng-gnn"], spec=spec, meta_params=meta_params("ng-gnn"))
    found = run(optimizer, params, [gradient])[0]
    moves = ngjax.random_permutations(jax.random.key(1), spec)
    permuted = [ngjax.permute_params(spec, moves, tree) for tree in (params, gradient)]
    moved = run(optimizer, permuted[0], [permuted[1]])[0]
    expected = ngjax.permute_params(spec, moves, jax.tree.map(lambda leaf: leaf[0], found))
    assert_close(jax.tree.map(lambda leaf: leaf[0], moved), expected)


# -- shipped weights ---------------------------------------------------------------------------------------------------


def test_the_package_has_weights_with_cards():
    default = {f"{rule}-normalized" for rule in ("ng-gnn", "ng-t", "ff", "lstm", "celo2")}
    paper = {f"{rule}-paper" for rule in ("ng-gnn", "ng-t", "nfn", "ff", "lstm")}
    assert set(shipped.shipped_names()) == default | paper
    folder = importlib.resources.files("ngjax.optimizers") / "weights"
    files = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    assert set(files) == {f"{name}.{end}" for name in default | paper for end in ("safetensors", "md")}
    assert sum(files.values()) < 8e6


@pytest.mark.parametrize("name", shipped.shipped_names())
def test_shipped_meta_parameters_are_those_of_their_rule(name):
    rule, _, step = name.rpartition("-")
    theta = shipped.shipped_meta_params(rule, step)
    fresh = init_meta_params(jax.random.key(0), rule, step)
    assert_close(jax.tree.map(np.zeros_like, theta), jax.tree.map(np.zeros_like, fresh))
    found = run(ng_learned_opt(rule, step=step), PARAMS, GRADIENTS)[0]
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(found))


def test_shipped_meta_parameters_may_first_be_read_under_a_trace():
    shipped.shipped_meta_params.cache_clear()
    optimizer = optax.inject_hyperparams(ng_learned_opt)("ff", learning_rate=0.02)
    state = jax.jit(optimizer.init)(PARAMS)
    for _ in range(2):
        found, state = jax.jit(optimizer.update)(GRADIENTS[0], state, PARAMS)
    expected = run(ng_learned_opt("ff", learning_rate=0.02), PARAMS, 2 * GRADIENTS[:1])[0]
    assert_close(found, jax.tree.map(lambda leaf: leaf[1], expected))


def test_rules_without_shipped_weights_name_those_that_have_them():
    with pytest.raises(ValueError, match="no weights are shipped for rule='nfn' with step='normalized'; there are"):
        ng_learned_opt("nfn")
