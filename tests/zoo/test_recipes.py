"""The recipes: what they stand for, and what comes out on real images."""

import jax
import numpy as np

from ngjax import zoo
from ngjax.zoo import RECIPES, fit_images, fit_sirens, init_siren, render

SIZES = (2, 8, 8, 1)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def images_of(count):
    return zoo.load_digits().images[:count]


def test_published_numbers():
    """Navon et al. 2023 stop at 40 dB and add 0.5; Zhou et al. 2023 start as Sitzmann et al. and draw in [-1, 1]."""
    dwsnets, nfn = RECIPES["dwsnets"], RECIPES["nfn"]
    assert (dwsnets.init, dwsnets.steps, dwsnets.learning_rate, dwsnets.stop_psnr) == ("dwsnets", 1000, 5e-4, 40.0)
    assert (dwsnets.omega, dwsnets.output_offset, dwsnets.pixel_range) == (30.0, 0.5, (0.0, 1.0))
    assert (nfn.init, nfn.omega, nfn.output_offset, nfn.pixel_range) == ("sitzmann", 30.0, 0.0, (-1.0, 1.0))


def test_every_number_of_a_recipe_is_used():
    recipe = RECIPES["dwsnets"]._replace(steps=4)
    images, own = images_of(3), keys(3)
    fits = fit_images(recipe, own, SIZES, images)
    initial = jax.vmap(lambda key: init_siren(key, SIZES, rule="dwsnets"))(own)
    expected = fit_sirens(initial, images, steps=4, learning_rate=5e-4, omega=30.0, output_offset=0.5, stop_psnr=40.0)
    for leaf, wanted in zip(jax.tree.leaves(fits), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=1e-5)
    for change in (
        {"init": "sitzmann"},
        {"steps": 5},
        {"learning_rate": 1e-3},
        {"omega": 29.0},
        {"output_offset": 0.1},
        {"pixel_range": (-2.0, 2.0)},
        {"stop_psnr": 1.0},
    ):
        other = fit_images(recipe._replace(**change), own, SIZES, images)
        moved = jax.tree.map(lambda leaf, before: np.abs(leaf - before).max(), other.params, fits.params)
        assert max(jax.tree.leaves(moved)) > 1e-4, change


def test_psnr_is_that_of_pixels_between_0_and_1():
    recipe = RECIPES["nfn"]._replace(steps=3)
    images = images_of(2)
    fits = fit_images(recipe, keys(2), SIZES, images)
    drawn = jax.vmap(lambda params: render(params, 8, 8))(fits.params)
    mse = np.mean(((drawn + 1) / 2 - images) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(fits.mse, mse, rtol=1e-4)
    np.testing.assert_allclose(fits.psnr, -10 * np.log10(mse), atol=1e-3)


def test_keys_decide_the_start():
    recipe, images = RECIPES["fast"]._replace(steps=1), images_of(1).repeat(2, axis=0)
    fits = fit_images(recipe, keys(2), SIZES, images)
    assert not np.allclose(fits.params["layer_0"]["kernel"][0], fits.params["layer_0"]["kernel"][1])
    again = fit_images(recipe, keys(2), SIZES, images)
    assert jax.tree.all(jax.tree.map(np.array_equal, fits, again))
