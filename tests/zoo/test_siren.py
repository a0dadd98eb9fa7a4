"""SIRENs: recorded values and gradients, initialization, rendering and fitting."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngjax
from ngjax.zoo import apply_siren, fit_sirens, image_coordinates, init_siren, render

SIZES = (2, 8, 8, 1)


def stacked_sirens(count, sizes=SIZES, seed=0):
    return jax.vmap(lambda key: init_siren(key, sizes))(jax.random.split(jax.random.key(seed), count))


def smooth_images(count, side=6, seed=0):
    """Images that a small network represents well, one [side, side, 1] per row."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    slopes = rng.uniform(-1, 1, size=(count, 2, 1, 1))
    return (0.5 + 0.4 * np.tanh(slopes[:, 0] * (x - 0.5) + slopes[:, 1] * (y - 0.5)))[..., None].astype(np.float32)


def relative_error(value, recorded):
    return np.abs(value - recorded).max() / np.abs(recorded).max()


# -- recorded case ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(parity_dir):
    with np.load(parity_dir / "siren_render.npz") as case:
        return {name: case[name] for name in case.files}


def params_from(arrays, prefix):
    return {
        f"layer_{layer}": {
            "kernel": jnp.asarray(arrays[f"{prefix}/weights/{layer}"][..., 0]),
            "bias": jnp.asarray(arrays[f"{prefix}/biases/{layer}"][..., 0]),
        }
        for layer in range(3)
    }


def test_recorded_values_and_coordinates(recorded):
    config = json.loads(str(recorded["config"]))
    height, width = config["image_shape"]
    np.testing.assert_allclose(image_coordinates(height, width), recorded["in/coordinates"][0], atol=1e-7)
    images = jax.vmap(
        lambda params: render(params, height, width, omega=config["omega"], output_offset=config["output_offset"])
    )(params_from(recorded, "in"))
    assert images.shape == (2, height, width, 1)
    assert relative_error(images.reshape(2, -1, 1), recorded["out/values"]) < 1e-5


def test_recorded_gradients(recorded):
    coordinates = jnp.asarray(image_coordinates(14, 14))

    def loss(params):
        values = jax.vmap(lambda params: apply_siren(params, coordinates, output_offset=0.5))(params)
        return jnp.mean((values - recorded["in/target"]) ** 2)

    value, gradient = jax.value_and_grad(loss)(params_from(recorded, "in"))
    assert relative_error(value, recorded["out/loss"]) < 1e-5
    errors = jax.tree.map(relative_error, gradient, params_from(recorded, "grad"))
    assert max(jax.tree.leaves(errors)) < 1e-4


# -- initialization ---------------------------------------------------------------------------------------------------


def test_initialization_is_that_of_the_paper():
    params = init_siren(jax.random.key(0), (2, 512, 512, 3))
    bounds = {"layer_0": 1 / 2, "layer_1": np.sqrt(6 / 512) / 30, "layer_2": np.sqrt(6 / 512) / 30}
    for name, bound in bounds.items():
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.1
        assert np.abs(bias).max() <= 1 / np.sqrt(len(kernel))
    assert np.abs(params["layer_1"]["bias"]).max() > 0.9 / np.sqrt(512)


def test_arguments_of_the_second_sine_are_standard_normal_without_bias():
    """What the initialization is for (theorem 1.8 of the paper's supplement)."""
    params = init_siren(jax.random.key(1), (2, 1024, 1024, 1))
    no_bias = jax.tree.map_with_path(lambda path, leaf: leaf * float(path[-1].key == "kernel"), params)
    first = {"layer_0": no_bias["layer_0"], "layer_1": {"kernel": jnp.eye(1024), "bias": jnp.zeros(1024)}}
    hidden = apply_siren(first, jnp.asarray(image_coordinates(16, 16)))
    assert abs(float((30 * hidden @ no_bias["layer_1"]["kernel"]).std()) - 1) < 0.1


def test_layers_and_keys_draw_independently():
    params = init_siren(jax.random.key(0), (2, 8, 8, 8, 1))
    assert not np.allclose(params["layer_1"]["kernel"], params["layer_2"]["kernel"])
    other = init_siren(jax.random.key(1), (2, 8, 8, 8, 1))
    assert not np.allclose(params["layer_1"]["kernel"], other["layer_1"]["kernel"])


def test_layout_is_that_of_mlp_spec():
    spec = ngjax.mlp_spec(SIZES, activation="siren")
    params = init_siren(jax.random.key(0), SIZES)
    back = ngjax.to_params(spec, ngjax.to_graph(spec, params))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_dwsnets_rule_is_that_of_its_zoo():
    """One rule for all sine layers, whose biases are zero; the last layer is PyTorch's default."""
    params = init_siren(jax.random.key(0), (2, 512, 512, 3), omega=20.0, rule="dwsnets")
    bounds = {"layer_0": np.sqrt(6 / 2) / 20, "layer_1": np.sqrt(6 / 512) / 20, "layer_2": 1 / np.sqrt(512)}
    for name, bound in bounds.items():
        kernel = np.asarray(params[name]["kernel"])
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.1
    assert not params["layer_0"]["bias"].any()
    assert not params["layer_1"]["bias"].any()
    wide = init_siren(jax.random.key(0), (2, 512, 512, 1000), rule="dwsnets")["layer_2"]["bias"]
    assert 0.98 / np.sqrt(512) < np.abs(wide).max() <= 1 / np.sqrt(512)


def test_unknown_rules_raise():
    with pytest.raises(ValueError, match="rule: expected one of .*sitzmann.* received 'torch'"):
        init_siren.__wrapped__(jax.random.key(0), SIZES, rule="torch")  # past the check of types


@pytest.mark.parametrize("sizes", [(), (2,), (2, 0, 1)])
def test_impossible_sizes_raise(sizes):
    with pytest.raises(ValueError, match="sizes"):
        init_siren(jax.random.key(0), sizes)


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    params = {
        "layer_0": {"kernel": jnp.array([[0.1], [0.2]]), "bias": jnp.array([0.3])},
        "layer_1": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([0.5])},
    }
    value = apply_siren(params, jnp.array([1.0, -1.0]), omega=5.0, output_offset=10.0)
    np.testing.assert_allclose(value, [2 * np.sin(5 * 0.2) + 0.5 + 10], rtol=1e-6)


def test_more_than_ten_layers_are_applied_in_order():
    """`layer_10` sorts before `layer_2`, which is how JAX orders the leaves of a dict."""
    sizes = (2, *range(3, 14), 1)
    params = jax.eval_shape(lambda key: init_siren(key, sizes), jax.random.key(0))
    assert list(params)[2] == "layer_10"
    assert jax.eval_shape(apply_siren, params, jnp.zeros((5, 2))).shape == (5, 1)


def test_any_axes_in_front_of_the_coordinates():
    params = init_siren(jax.random.key(0), SIZES)
    coordinates = jnp.asarray(image_coordinates(3, 4)).reshape(3, 4, 2)
    one_by_one = jax.vmap(jax.vmap(lambda point: apply_siren(params, point)))(coordinates)
    np.testing.assert_allclose(apply_siren(params, coordinates), one_by_one, atol=1e-6)


def test_permuted_networks_render_the_same_image():
    spec = ngjax.mlp_spec(SIZES, activation="siren")
    params = init_siren(jax.random.key(0), SIZES)
    permuted = ngjax.permute_params(spec, ngjax.random_permutations(jax.random.key(1), spec), params)
    assert not np.allclose(params["layer_1"]["kernel"], permuted["layer_1"]["kernel"])
    np.testing.assert_allclose(render(params, 5, 5), render(permuted, 5, 5), atol=2e-5)


# -- fitting ----------------------------------------------------------------------------------------------------------


def test_fits_approach_their_images():
    images = smooth_images(3)
    fits = fit_sirens(stacked_sirens(3), images, steps=150, learning_rate=2e-3, output_offset=0.5)
    assert fits.psnr.min() > 40
    rendered = jax.vmap(lambda params: render(params, 6, 6, output_offset=0.5))(fits.params)
    # What is reported is what the networks do.
    np.testing.assert_allclose(np.mean((rendered - images) ** 2, axis=(1, 2, 3)), fits.mse, rtol=1e-2)
    np.testing.assert_allclose(fits.psnr, -10 * np.log10(fits.mse), rtol=1e-5)


def test_one_step_is_one_step_of_adam():
    """Bias-corrected, the first step of Adam has the size of the learning rate and the gradient's sign."""
    images, initial = smooth_images(2), stacked_sirens(2)
    fitted = fit_sirens(initial, images, steps=1, learning_rate=1e-4).params

    def loss(params, image):
        return jnp.mean((render(params, 6, 6) - image) ** 2)

    gradient = jax.vmap(jax.grad(loss))(initial, jnp.asarray(images))
    moved = jax.tree.map(lambda after, before: after - before, fitted, initial)
    for step, slope in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(step, -1e-4 * np.sign(slope), atol=2e-6)


def test_zero_steps_return_the_start():
    initial = stacked_sirens(2)
    fits = fit_sirens(initial, smooth_images(2), steps=0)
    assert jax.tree.all(jax.tree.map(np.array_equal, fits.params, initial))


def test_the_result_does_not_depend_on_the_chunks():
    """Seven networks, in chunks of one, of three (the last of which is filled up) and all at once."""
    images, initial = smooth_images(7), stacked_sirens(7)
    network_bytes = 4 * 4 * (8 + 8 + 1) * 36
    calls = []
    whole, threes, ones = (
        fit_sirens(
            initial,
            images,
            steps=20,
            chunk_bytes=size * network_bytes,
            progress=lambda done, of: calls.append((done, of)),
        )
        for size in (100, 3, 1)
    )
    for other in (threes, ones):
        assert other.mse.shape == (7,)
        np.testing.assert_allclose(other.mse, whole.mse, rtol=1e-3)
        for part, expected in zip(jax.tree.leaves(other.params), jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_allclose(part, expected, atol=1e-5)
    assert calls == [(7, 7), (3, 7), (6, 7), (7, 7), *((done, 7) for done in range(1, 8))]


def test_one_shared_start_equals_that_start_for_each():
    images, initial = smooth_images(3), init_siren(jax.random.key(5), SIZES)
    shared = fit_sirens(initial, images, steps=10)
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), initial)
    repeated = fit_sirens(copies, images, steps=10)
    assert jax.tree.all(jax.tree.map(np.array_equal, shared, repeated))
    assert not np.allclose(shared.params["layer_0"]["bias"][0], shared.params["layer_0"]["bias"][1])


def test_color_images_need_three_outputs():
    images = np.repeat(smooth_images(2), 3, axis=-1)
    fits = fit_sirens(stacked_sirens(2, sizes=(2, 8, 3)), images, steps=3)
    assert render(jax.tree.map(lambda leaf: leaf[0], fits.params), 6, 6).shape == (6, 6, 3)
    with pytest.raises(ValueError, match="3 channels, received 2 inputs and 1 outputs"):
        fit_sirens(stacked_sirens(2), images, steps=3)


def test_wrong_images_raise():
    with pytest.raises(ValueError, match="at least one"):
        fit_sirens(stacked_sirens(1), np.zeros((0, 6, 6, 1), np.float32), steps=1)
    broken = smooth_images(3)
    broken[1, 2, 3, 0] = np.nan
    with pytest.raises(ValueError, match="image 1 has values that are not finite"):
        fit_sirens(stacked_sirens(3), broken, steps=1)
    with pytest.raises(ValueError, match="expected 3 networks, one per image, or a single one; received 2"):
        fit_sirens(stacked_sirens(2), smooth_images(3), steps=1)
    with pytest.raises(ValueError, match="steps: expected 0 or more, received -1"):
        fit_sirens(stacked_sirens(3), smooth_images(3), steps=-1)
    with pytest.raises(ValueError, match="pixel_range"):
        fit_sirens(stacked_sirens(3), smooth_images(3), steps=1, pixel_range=(1.0, 1.0))


def slow_fits(initial, images, *, steps, learning_rate, stop_psnr, pixel_range):
    """One network after the other by optax, step by step, as one would write it down."""
    low, high = pixel_range
    optimizer = optax.adam(learning_rate)

    def mse(params, image):
        drawn = render(params, *image.shape[:2], omega=20.0, output_offset=0.25)
        return jnp.mean((drawn - (low + (high - low) * image)) ** 2)

    @jax.jit
    def step(params, state, image):
        value, gradient = jax.value_and_grad(mse)(params, image)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        return value, optax.apply_updates(params, updates), state

    for row, image in enumerate(images):
        params = jax.tree.map(lambda leaf, row=row: leaf[row], initial)
        state, taken = optimizer.init(params), 0
        while True:
            value, *after = step(params, state, image)
            psnr = -10 * np.log10(max(float(value), 1e-20) / (high - low) ** 2)
            if taken == steps or psnr >= stop_psnr:
                break
            (params, state), taken = after, taken + 1
        yield params, psnr, taken


@pytest.mark.parametrize(
    ("sizes", "pixel_range", "steps"), [((2, 8, 8, 1), (0.0, 1.0), 30), ((2, 5, 9, 4, 3), (-1.0, 2.0), 60)]
)
def test_fits_are_those_of_a_loop_over_single_networks(sizes, pixel_range, steps):
    """Networks that stop at different steps, one before the first and one never."""
    images = np.repeat(smooth_images(4, side=7)[:, :5], sizes[-1], axis=-1)
    images[3] = np.random.default_rng(0).integers(0, 2, size=images[3].shape)  # which nothing so small can draw
    initial = stacked_sirens(4, sizes)
    last = f"layer_{len(sizes) - 2}"
    flat = {"kernel": jnp.zeros_like(initial[last]["kernel"][0]), "bias": jnp.full(sizes[-1], pixel_range[1] - 0.25)}
    initial = initial | {last: jax.tree.map(lambda leaf, value: leaf.at[0].set(value), initial[last], flat)}
    images[0] = 1.0  # what the first network draws from the start
    arguments = {"steps": steps, "learning_rate": 3e-3, "stop_psnr": 22.0, "pixel_range": pixel_range}
    fits = fit_sirens(initial, images, omega=20.0, output_offset=0.25, **arguments)
    for row, (params, psnr, taken) in enumerate(slow_fits(initial, images, **arguments)):
        assert fits.steps[row] == taken
        if row:
            np.testing.assert_allclose(fits.psnr[row], psnr, atol=1e-2)
        for leaf, expected in zip(jax.tree.leaves(fits.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(leaf[row], expected, atol=1e-4)
    assert fits.steps[0] == 0
    assert fits.steps[3] == steps
    assert 0 < fits.steps[1] < steps
    assert 0 < fits.steps[2] < steps
    assert fits.steps[1] != fits.steps[2]
    assert (fits.psnr[:3] > 22).all()
    assert fits.psnr[3] < 22


def test_all_steps_are_taken_where_nothing_stops_them():
    fits = fit_sirens(stacked_sirens(2), smooth_images(2), steps=5)
    np.testing.assert_array_equal(fits.steps, [5, 5])
    assert fits.steps.dtype == np.int32


def test_company_does_not_matter():
    """The same networks with other ones beside them, in another order: bit for bit the same."""
    images, initial = smooth_images(6), stacked_sirens(6)
    arguments = {"steps": 20, "learning_rate": 3e-3, "stop_psnr": 30.0}

    def fit(rows):
        fits = fit_sirens(jax.tree.map(lambda leaf: leaf[rows], initial), images[rows], **arguments)
        return {row: jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), fits) for i, row in enumerate(rows.tolist())}

    one, other = fit(np.array([0, 1, 2, 3])), fit(np.array([5, 2, 0, 4]))
    for row in (0, 2):
        assert jax.tree.all(jax.tree.map(np.array_equal, one[row], other[row]))


def test_errors_in_the_progress_callback_are_raised():
    def fail(done, of):
        raise RuntimeError(f"{done} of {of}")

    with pytest.raises(RuntimeError, match="1 of 7"):
        fit_sirens(stacked_sirens(7), smooth_images(7), steps=1, chunk_bytes=1, progress=fail)
