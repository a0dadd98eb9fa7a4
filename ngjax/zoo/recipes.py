"""How zoos of image SIRENs are fitted: two published recipes and a fast one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from ngjax.zoo.siren import InitRule, SirenFits, SirenParams, fit_sirens, init_siren


class SirenRecipe(NamedTuple):
    """All numbers behind a fit, besides the architecture.

    Attributes:
      init: rule of the random start, see `init_siren`.
      steps: of Adam at most, each over all pixels of the image.
      learning_rate: of Adam, constant.
      omega: frequency of the sines.
      output_offset: added to the output of the network.
      pixel_range: what the network gives for pixels of 0 and of 1.
      stop_psnr: a network that has reached this many dB is done. `None`: all take all steps.
    """

    init: InitRule
    steps: int
    learning_rate: float
    omega: float
    output_offset: float
    pixel_range: tuple[float, float]
    stop_psnr: float | None


# "dwsnets": all numbers are those of Navon et al. 2023 (arXiv 2301.12780) and of their code. With its start hardly an
# MNIST digit reaches 40 dB in 1,000 steps; the median is about 23.5 dB.
#
# "nfn": Zhou et al. 2023 (arXiv 2302.14040) state the original SIREN, without an offset, and their code has pixels in
# [-1, 1]. It does not say how they fitted: learning rate and number of steps are a choice made here.
#
# "fast": the start of "dwsnets", with a learning rate that reaches the same fidelity in a quarter of the steps.
RECIPES = {
    "dwsnets": SirenRecipe("dwsnets", 1000, 5e-4, 30.0, 0.5, (0.0, 1.0), 40.0),
    "nfn": SirenRecipe("sitzmann", 5000, 5e-5, 30.0, 0.0, (-1.0, 1.0), None),
    "fast": SirenRecipe("dwsnets", 250, 5e-3, 30.0, 0.5, (0.0, 1.0), None),
}


def fit_images(
    recipe: SirenRecipe,
    keys: Key[Array, " B"],
    sizes: Sequence[int],
    images: Float[Array | np.ndarray, "B height width channels"],
    *,
    chunk_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SirenFits:
    """One SIREN per image, made by a recipe, each from a random start of its own.

    Args:
      recipe: one of `RECIPES`, or one made from it by `_replace`.
      keys: a random key for each network.
      sizes: neurons per layer, 2 inputs and one output per channel included.
      images: pixel values in [0, 1].
      chunk_bytes: see `fit_sirens`.
      progress: see `fit_sirens`.
    """
    return fit_sirens(
        _init_sirens(keys, tuple(sizes), recipe.omega, recipe.init),
        images,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        omega=recipe.omega,
        output_offset=recipe.output_offset,
        pixel_range=recipe.pixel_range,
        stop_psnr=recipe.stop_psnr,
        chunk_bytes=chunk_bytes,
        progress=progress,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _init_sirens(keys: Key[Array, " B"], sizes: tuple[int, ...], omega: float, rule: InitRule) -> SirenParams:
    return jax.vmap(lambda key: init_siren(key, sizes, omega=omega, rule=rule))(keys)
