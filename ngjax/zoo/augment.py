"""Augmentations of image SIRENs: random changes of the weights that leave what the image shows as it was.

`translate`, `rotate` and `scale` move the image exactly, through the first layer alone: a network is a function of
coordinates, and the first thing it does to them is linear. Noise and dropout change every weight a little. Together
they are the augmentations with which Navon et al. 2023 (arXiv 2301.12780) and Kofinas et al. 2024 (arXiv 2403.12143)
trained on INRs. All functions take the parameters of one network, `{"layer_0": {"kernel": [in, out], "bias": [out]},
...}`, and work under `vmap`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ngjax.spec import NeuralGraphSpec
from ngjax.symmetry import permute_randomly
from ngjax.zoo.siren import SirenParams

Scalar = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How strong each augmentation is; 0 leaves it out. They are applied in the order of the fields.

    Attributes:
      translation: the image moves by up to this much along each axis, uniformly; it is 2 wide.
      rotation: it turns by up to so many degrees either way, uniformly. For networks of two inputs.
      scaling: coordinates are multiplied by a factor drawn uniformly from `1 ± scaling`.
      noise: deviation of the noise on each kernel and bias, in units of that array's own standard deviation.
      dropout: share of weights and biases that become zero, see `drop_weights`.
      permutation: put the hidden neurons into a random order, which leaves the image as it is.
      noise_kind: `"gaussian"`, or `"constant"`, which adds the deviation itself to every entry: nothing is drawn.
      translation_kind: `"exact"`, or `"linear"`, which takes the translation linearly through the kernels of a random
        number of layers and adds the result to the bias behind them. It moves the image in the first layer alone, and
        is no translation in the others.

    Raises:
      ValueError: a strength that is negative or not finite, a dropout of 1 or more, an unknown kind.
    """

    translation: float = 0.0
    rotation: float = 0.0
    scaling: float = 0.0
    noise: float = 0.0
    dropout: float = 0.0
    permutation: bool = False
    noise_kind: Literal["gaussian", "constant"] = "gaussian"
    translation_kind: Literal["exact", "linear"] = "exact"

    def __post_init__(self) -> None:
        for name in ("translation", "rotation", "scaling", "noise", "dropout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}, expected a finite number of at least 0")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}, expected less than 1")
        for name, kinds in (("noise_kind", ("gaussian", "constant")), ("translation_kind", ("exact", "linear"))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {kinds}")


_PAPER = AugmentConfig(translation=0.25, rotation=45.0, scaling=0.2, noise=0.1, dropout=0.01)

AUGMENTATIONS: dict[str, AugmentConfig] = {
    "none": AugmentConfig(),
    "paper": _PAPER,
    "reference": dataclasses.replace(_PAPER, noise_kind="constant", translation_kind="linear"),
}
"""By name. `"paper"` has the strengths of the papers; `"reference"` does what their PyTorch code does with them."""


def augment(key: PRNGKeyArray, spec: NeuralGraphSpec, params: SirenParams, config: AugmentConfig) -> SirenParams:
    """One random change of one network; `vmap` over keys and stacked parameters for many.

    Args:
      key: all that is drawn follows from it. What one augmentation draws does not depend on which others there are.
      spec: of the architecture, a static value.
      params: of a SIREN.
      config: what to do, a static value.

    Raises:
      ValueError: a rotation of networks that have not two inputs; parameters of another architecture than the spec,
        where neurons are permuted.
    """
    # By position: adding a kind at the end leaves the draws of the others as they were.
    translation_key, rotation_key, scaling_key, noise_key, dropout_key, permutation_key = jax.random.split(key, 6)
    shift = None
    if config.translation:
        num_inputs = params["layer_0"]["kernel"].shape[0]
        shift = config.translation * jax.random.uniform(translation_key, (num_inputs,), minval=-1.0, maxval=1.0)
    if shift is not None and config.translation_kind == "linear":
        params = _translate_linearly(jax.random.fold_in(translation_key, 1), params, shift)
    elif shift is not None:
        params = translate(params, shift)
    if config.rotation:
        degrees = config.rotation * jax.random.uniform(rotation_key, minval=-1.0, maxval=1.0)
        params = rotate(params, degrees * (math.pi / 180))
    if config.scaling:
        params = scale(params, 1 + config.scaling * jax.random.uniform(scaling_key, minval=-1.0, maxval=1.0))
    if config.noise and config.noise_kind == "constant":
        params = jax.tree.map(lambda leaf: leaf + config.noise * _deviation(leaf), params)
    elif config.noise:
        params = add_noise(noise_key, params, config.noise)
    if config.dropout:
        params = drop_weights(dropout_key, params, config.dropout)
    if config.permutation:
        params = permute_randomly(permutation_key, spec, params)
    return params


# -- exact: the image moves -------------------------------------------------------------------------------------------


def translate(params: SirenParams, shift: Float[Array, " in"]) -> SirenParams:
    """`new(x) = old(x + shift)`, so that the image moves by `-shift`: the first bias becomes `b + shift @ W`."""
    kernel, bias = _first_layer(params)
    return {**params, "layer_0": {"kernel": kernel, "bias": bias + _matmul(shift, kernel)}}


def rotate(params: SirenParams, angle: Scalar) -> SirenParams:
    """`new(x) = old(x @ R)` with `R = [[cos, -sin], [sin, cos]]`, by which the first kernel becomes `R @ W`.

    In the coordinates of `image_coordinates`, whose second axis points down the rows, a positive angle turns the image
    clockwise as it is looked at, about its centre.

    Args:
      params: of a network of two inputs.
      angle: in radians.

    Raises:
      ValueError: another number of inputs.
    """
    kernel, bias = _first_layer(params)
    if kernel.shape[0] != 2:
        raise ValueError(f"rotate: expected a network of 2 inputs, received one of {kernel.shape[0]}")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    return {**params, "layer_0": {"kernel": _matmul(rotation.astype(kernel.dtype), kernel), "bias": bias}}


def scale(params: SirenParams, factor: Scalar) -> SirenParams:
    """`new(x) = old(factor * x)`: a factor above 1 makes the image smaller, about its centre."""
    kernel, bias = _first_layer(params)
    return {**params, "layer_0": {"kernel": kernel * factor, "bias": bias}}


def _first_layer(params: SirenParams) -> tuple[Array, Array]:
    return jnp.asarray(params["layer_0"]["kernel"]), jnp.asarray(params["layer_0"]["bias"])


def _matmul(a: Array, b: Array) -> Array:
    # In full float32 also where the default is less: omega times this is an angle.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


# -- the weights change -----------------------------------------------------------------------------------------------


def add_noise(key: PRNGKeyArray, params: SirenParams, size: float) -> SirenParams:
    """Gaussian noise on every entry, `size` times the standard deviation of its kernel or bias.

    Arrays of one entry, which have no deviation, stay as they are: the bias of a network with a single output.
    """
    noise = _per_entry(lambda shape: jax.random.normal(key, shape), params)
    return jax.tree.map(lambda leaf, drawn: leaf + size * _deviation(leaf) * drawn.astype(leaf.dtype), params, noise)


def drop_weights(key: PRNGKeyArray, params: SirenParams, rate: float) -> SirenParams:
    """Sets each weight and bias to zero with probability `rate`, and divides the others by `1 - rate`."""
    kept = _per_entry(lambda shape: jax.random.bernoulli(key, 1 - rate, shape), params)
    return jax.tree.map(lambda leaf, keep: jnp.where(keep, leaf / (1 - rate), 0), params, kept)


def _per_entry(draw: Callable[[tuple[int, ...]], Array], params: SirenParams) -> Any:
    """A random number for each entry of each array. One draw for all: generators take long to compile."""
    leaves, treedef = jax.tree.flatten(params)
    cuts = list(itertools.accumulate(leaf.size for leaf in leaves))
    parts = jnp.split(draw((cuts[-1],)), cuts[:-1])
    return jax.tree.unflatten(treedef, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _translate_linearly(key: PRNGKeyArray, params: SirenParams, shift: Float[Array, " in"]) -> SirenParams:
    depth = len(params)
    chosen = jax.random.randint(key, (), 0, max(depth - 1, 1))  # never the last layer of several
    moved = {}
    for i in range(depth):
        kernel, bias = (jnp.asarray(params[f"layer_{i}"][name]) for name in ("kernel", "bias"))
        shift = _matmul(shift, kernel)
        moved[f"layer_{i}"] = {"kernel": kernel, "bias": bias + jnp.where(chosen == i, shift, 0)}
    return moved


def _deviation(values: Array) -> Float[Array, ""]:
    """With Bessel's correction; 0 for a single entry."""
    if values.size < 2:
        return jnp.zeros((), values.dtype)
    return jnp.std(values, ddof=1)
