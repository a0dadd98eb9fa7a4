"""Augmentations of SIRENs: what they do to the image, to the weights, and from which random numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.zoo import AUGMENTATIONS, AugmentConfig, apply_siren, augment, image_coordinates, init_siren, render
from ngjax.zoo.augment import add_noise, drop_weights, rotate, scale, translate

SIZES = (2, 16, 12, 1)
SPEC = ngjax.mlp_spec(SIZES, activation="siren")
PARAMS = init_siren(jax.random.key(0), SIZES)
COORDINATES = jnp.asarray(image_coordinates(7, 7))


@functools.cache
def many(config, count=400):
    """`PARAMS` augmented with as many keys, leaves `[count, ...]`."""
    keys = jax.random.split(jax.random.key(1), count)
    return jax.jit(jax.vmap(lambda key: augment(key, SPEC, PARAMS, config)))(keys)


def distance(params, other):
    """Largest difference of a weight, by leaf, for the networks of `params`."""
    return jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).reshape(-1, b.size).max(axis=-1), params, other
    )


def values(params, coordinates=COORDINATES):
    return apply_siren(params, coordinates)


# -- exact ones -------------------------------------------------------------------------------------------------------


def test_a_translated_network_has_the_values_of_shifted_coordinates():
    shift = jnp.array([0.2, -0.13])
    moved = translate(PARAMS, shift)
    np.testing.assert_allclose(values(moved), values(PARAMS, COORDINATES + shift), atol=2e-5)
    assert np.abs(values(moved) - values(PARAMS)).max() > 0.05
    np.testing.assert_array_equal(moved["layer_0"]["kernel"], PARAMS["layer_0"]["kernel"])


def test_a_rotated_network_has_the_values_of_rotated_coordinates():
    angle = 0.7
    turned = rotate(PARAMS, angle)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    np.testing.assert_allclose(values(turned), values(PARAMS, COORDINATES @ rotation), atol=2e-5)


def test_a_positive_angle_turns_the_image_clockwise():
    clockwise = np.rot90(render(PARAMS, 7, 7)[..., 0], k=-1)
    np.testing.assert_allclose(render(rotate(PARAMS, np.pi / 2), 7, 7)[..., 0], clockwise, atol=2e-5)


def test_a_scaled_network_has_the_values_of_scaled_coordinates():
    np.testing.assert_allclose(values(scale(PARAMS, 1.3)), values(PARAMS, 1.3 * COORDINATES), atol=2e-5)


def test_only_the_first_layer_moves_the_image():
    config = AugmentConfig(translation=0.3, rotation=30.0, scaling=0.1)
    changes = distance(many(config), PARAMS)
    assert changes["layer_0"]["kernel"].min() > 0
    assert changes["layer_0"]["bias"].min() > 0
    for name in ("layer_1", "layer_2"):
        assert max(map(np.max, jax.tree.leaves(changes[name]))) == 0


def test_together_they_are_one_map_of_the_coordinates():
    """`x -> scale x R + shift`, within the limits of the configuration, recovered from the first layer."""
    config = AugmentConfig(translation=0.3, rotation=30.0, scaling=0.1)
    first = many(config)["layer_0"]
    inverse = np.linalg.pinv(PARAMS["layer_0"]["kernel"])
    matrices = np.asarray(first["kernel"]) @ inverse
    shifts = (np.asarray(first["bias"]) - PARAMS["layer_0"]["bias"]) @ inverse
    factors = np.sqrt(np.linalg.det(matrices))
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    for drawn, low, high in (
        (factors, 0.9, 1.1),
        (angles, -30, 30),
        (shifts[:, 0], -0.3, 0.3),
        (shifts[:, 1], -0.3, 0.3),
    ):
        width = high - low
        assert low - 1e-4 * width <= drawn.min() < low + 0.05 * width
        assert high - 0.05 * width < drawn.max() <= high + 1e-4 * width
        assert abs(drawn.mean() - (low + high) / 2) < 0.1 * width
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.2
    network = jax.tree.map(lambda leaf: leaf[5], many(config))
    np.testing.assert_allclose(values(network), values(PARAMS, COORDINATES @ matrices[5] + shifts[5]), atol=5e-5)


def test_permutation_leaves_the_image():
    networks = many(AugmentConfig(permutation=True), count=20)
    assert distance(networks, PARAMS)["layer_1"]["kernel"].min() > 0
    images = jax.vmap(values)(networks)
    np.testing.assert_allclose(images, jnp.broadcast_to(values(PARAMS), images.shape), atol=2e-5)


# -- the weights change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layer_0", "layer_1", "layer_2"])
def test_noise_is_normal_with_the_deviation_of_each_array(name):
    noisy = many(AugmentConfig(noise=0.1))
    for kind, given in PARAMS[name].items():
        if given.size == 1:
            continue
        noise = (np.asarray(noisy[name][kind]) - given) / (0.1 * np.std(given, ddof=1))
        assert abs(noise.mean()) < 0.1
        assert abs(noise.std() - 1) < 0.06
        assert 2.5 < np.abs(noise).max() < 6
        # Every entry by itself, not one number for the array.
        assert noise.std(axis=0).min() > 0.8
        assert noise.reshape(len(noise), -1).std(axis=1).mean() > 0.8


def test_a_single_entry_gets_no_noise():
    noisy = many(AugmentConfig(noise=0.1))["layer_2"]["bias"]
    np.testing.assert_array_equal(noisy, np.broadcast_to(PARAMS["layer_2"]["bias"], noisy.shape))


def test_arrays_and_networks_get_noise_of_their_own():
    equal = {"layer_0": {"kernel": jnp.arange(6.0), "bias": jnp.arange(6.0)}}
    noisy = add_noise(jax.random.key(0), equal, 0.1)["layer_0"]
    assert np.abs(noisy["kernel"] - noisy["bias"]).max() > 0.01
    networks = many(AugmentConfig(noise=0.1))["layer_1"]["kernel"]
    assert np.abs(networks[0] - networks[1]).max() > 0


def test_dropped_weights_are_zero_and_the_others_larger():
    dropped = drop_weights(jax.random.key(3), PARAMS, 0.25)
    for after, before in zip(jax.tree.leaves(dropped), jax.tree.leaves(PARAMS), strict=True):
        kept = np.asarray(after) != 0
        np.testing.assert_allclose(np.asarray(after)[kept], np.asarray(before)[kept] / 0.75, rtol=1e-6)
    networks = many(AugmentConfig(dropout=0.25))
    for leaf in jax.tree.leaves(networks):
        shares = np.mean(np.asarray(leaf) == 0, axis=0)
        assert shares.min() > 0.1
        assert shares.max() < 0.4
        assert abs(shares.mean() - 0.25) < 0.08


# -- what the reference does ------------------------------------------------------------------------------------------


def test_constant_noise_adds_the_deviation():
    config = AugmentConfig(noise=0.1, noise_kind="constant")
    for after, before in zip(jax.tree.leaves(many(config, count=2)), jax.tree.leaves(PARAMS), strict=True):
        deviation = np.std(before, ddof=1) if before.size > 1 else 0.0
        np.testing.assert_allclose(after - before, np.full(after.shape, 0.1 * deviation), atol=1e-7)


def test_linear_translation_goes_through_some_layers():
    """Either the first bias moves by `t W_0`, or the second by `t W_0 W_1`; about as often."""
    changed = many(AugmentConfig(translation=0.3, translation_kind="linear"))
    moves = {name: np.asarray(changed[name]["bias"]) - PARAMS[name]["bias"] for name in PARAMS}
    in_first, in_second = (np.abs(moves[name]).max(axis=-1) > 1e-7 for name in ("layer_0", "layer_1"))
    assert np.array_equal(in_first, ~in_second)
    assert 0.4 < in_first.mean() < 0.6
    assert np.abs(moves["layer_2"]).max() == 0
    kernels = [np.asarray(PARAMS[name]["kernel"]) for name in ("layer_0", "layer_1")]
    for name, chosen, matrix in (("layer_0", in_first, kernels[0]), ("layer_1", in_second, kernels[0] @ kernels[1])):
        shifts = moves[name][chosen] @ np.linalg.pinv(matrix)
        np.testing.assert_allclose(shifts @ matrix, moves[name][chosen], atol=1e-6)
        assert 0.25 < np.abs(shifts).max() <= 0.3 + 1e-3
    for name in PARAMS:
        assert distance(changed[name]["kernel"], PARAMS[name]["kernel"]).max() == 0


def test_linear_translation_of_one_layer_is_exact():
    sizes = (2, 3)
    params = init_siren(jax.random.key(0), sizes)
    spec = ngjax.mlp_spec(sizes)
    run = jax.jit(augment, static_argnums=(1, 3))
    configs = [AugmentConfig(translation=0.3, translation_kind=kind) for kind in ("exact", "linear")]
    results = [run(jax.random.key(4), spec, params, config)["layer_0"]["bias"] for config in configs]
    np.testing.assert_allclose(*results, rtol=1e-6)


# -- configurations ---------------------------------------------------------------------------------------------------


def test_nothing_is_the_identity():
    params = augment(jax.random.key(0), SPEC, PARAMS, AUGMENTATIONS["none"])
    assert jax.tree.all(jax.tree.map(np.array_equal, params, PARAMS))


def test_the_named_ones_have_the_strengths_of_the_paper():
    for name in ("paper", "reference"):
        assert dataclasses.astuple(AUGMENTATIONS[name])[:6] == (0.25, 45.0, 0.2, 0.1, 0.01, False)
    changes = {name: distance(many(AUGMENTATIONS[name]), PARAMS) for name in ("paper", "reference")}
    # Dropout changes a single entry of a network only now and then.
    assert changes["paper"]["layer_1"]["kernel"].min() > 0.1 * np.std(PARAMS["layer_1"]["kernel"])
    assert changes["paper"]["layer_2"]["bias"].max() > 0


def test_draws_of_one_do_not_depend_on_the_others():
    alone = many(AugmentConfig(translation=0.3))["layer_0"]["bias"]
    together = many(AugmentConfig(translation=0.3, rotation=10.0, scaling=0.1))["layer_0"]["bias"]
    np.testing.assert_array_equal(alone, together)


def test_rotation_needs_two_inputs():
    sizes = (3, 8, 1)
    params = init_siren(jax.random.key(0), sizes)
    spec = ngjax.mlp_spec(sizes, activation="siren")
    with pytest.raises(ValueError, match="expected a network of 2 inputs, received one of 3"):
        augment(jax.random.key(0), spec, params, AUGMENTATIONS["paper"])
    other = dataclasses.replace(AUGMENTATIONS["paper"], rotation=0.0)
    changed = jax.eval_shape(lambda key: augment(key, spec, params, other), jax.random.key(0))
    assert changed["layer_0"]["kernel"].shape == (3, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": -0.1}, "noise=-0.1, expected a finite number of at least 0"),
        ({"rotation": float("nan")}, "rotation=nan"),
        ({"dropout": 1.0}, "dropout=1.0, expected less than 1"),
        ({"noise_kind": "uniform"}, "noise_kind='uniform', expected one of"),
        ({"translation_kind": ""}, "translation_kind='', expected one of"),
    ],
)
def test_wrong_settings_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        # Past the checks that the tests put on annotated types.
        AugmentConfig.__init__.__wrapped__(object.__new__(AugmentConfig), **changes)
