"""What `ng_learned_opt` does with the numbers of a rule: forms of the step, learning rate, decay, clipping, dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax.optimizers import heads, init_meta_params, ng_learned_opt, steps
from tests.optimizers.small import GRADIENTS, PARAMS, RULES, SPEC, assert_close, meta_params, run, updates


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
    ("shape", "scale"),
    [((6, 4), 1), ((4, 6), 1e30), ((3, 3, 7, 5), 1), ((2, 4, 8), 1e-30), ((5, 5), 1), ((4, 4, 3), 1)],
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


def test_scalars_without_any_gradient_count_nowhere():
    rng, shape = np.random.default_rng(0), (4, 3)
    moving = np.arange(12).reshape(shape) % 5 != 0
    head = rng.standard_normal((*shape, 2)).astype(np.float32)
    gradient = np.where(moving, rng.standard_normal(shape), 0).astype(np.float32)
    nominal = 1.9 * gradient / np.sqrt(np.mean((1.9 * gradient)[moving] ** 2))
    direction = np.where(moving, 0.1 * head[..., 0] * np.exp(0.01 * head[..., 1]) - nominal, 0)
    expected = np.where(moving, steps.orthogonalized(jnp.asarray(direction, jnp.float32)), 0)
    expected *= steps.step_size(shape) / np.sqrt(np.mean(expected[moving] ** 2))
    found = steps.normalized_step(jnp.asarray(head), jnp.asarray(gradient), [jnp.asarray(gradient)] * 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("step", "rate"), [("normalized", 0.01), ("paper", 1.0)])
def test_the_learning_rate_where_none_is_given(step, rate):
    assert_close(updates(step=step), updates(step=step, learning_rate=rate), tolerance=0)


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


@pytest.mark.parametrize("decays", [False, True])
def test_one_array_has_a_mask_of_one_boolean(decays):
    kernels = [tree["layer_0"]["kernel"] for tree in (PARAMS, GRADIENTS[0])]

    def update(**options):
        return run(ng_learned_opt(RULES["ff"], meta_params=meta_params("ff"), **options), kernels[0], kernels[1:])[0]

    found = update(weight_decay=0.1, weight_decay_mask=decays)
    np.testing.assert_array_equal(found, update(weight_decay=0.1 if decays else 0.0))


def test_masks_may_be_of_numpy():
    mask = {"layer_0": {"kernel": np.True_, "bias": np.False_}, "layer_1": np.False_}
    plain = {"layer_0": {"kernel": True, "bias": False}, "layer_1": False}
    found, expected = (updates(weight_decay=0.1, weight_decay_mask=m) for m in (mask, plain))
    assert_close(found, expected, tolerance=0)


def test_a_tree_without_leaves_may_have_a_mask():
    optimizer = ng_learned_opt(RULES["ff"], meta_params=meta_params("ff"), weight_decay=0.1, weight_decay_mask={})
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}


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


def test_clipping_leaves_weight_decay_as_it_is():
    options = {"clip": 0.5, "learning_rate": 2.0}
    decayed, plain = updates(weight_decay=3.0, **options), updates(**options)
    assert_close(decayed, jax.tree.map(lambda u, p: u - np.float32(6) * p, plain, PARAMS))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def test_weight_decay_of_bfloat16_is_rounded_once():
    optimizer = ng_learned_opt(RULES["ff"], meta_params=meta_params("ff"), learning_rate=0.3, weight_decay=0.1)
    params, nothing = cast(PARAMS, jnp.bfloat16), [scaled(PARAMS, 0)]
    expected = cast(run(optimizer, cast(params, jnp.float32), nothing)[0], jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, run(optimizer, params, nothing)[0], expected)


@pytest.mark.parametrize("name", RULES)
def test_meta_parameters_of_less_precision_are_computed_with_in_float32(name):
    rough = cast(meta_params(name), jnp.bfloat16)
    found, expected = (
        run(ng_learned_opt(RULES[name], meta_params=theta, spec=SPEC), PARAMS, GRADIENTS[:1])[0]
        for theta in (rough, cast(rough, jnp.float32))
    )
    assert_close(found, expected, tolerance=0)


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


@pytest.mark.parametrize(("shape", "kernel"), [((40, 3), 1), ((10, 4, 3), 4)])
def test_chunks_have_so_many_scalars_and_are_computed_again_for_the_derivative(shape, kernel):
    x, backbone = jnp.ones(shape), jnp.ones((10, 1, 5) if kernel > 1 else 5)
    jaxpr = jax.make_jaxpr(lambda x: heads.in_chunks(lambda f, _: f[..., :2], 8, x, backbone))(x)
    (scan,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert scan.params["length"] == 40 // 8
    assert any(name in str(scan) for name in ("checkpoint", "remat"))  # by the version of jax


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
