"""SIRENs, the networks with sine activations that represent images: initialize, evaluate, render, fit.

Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", NeurIPS 2020 (arXiv 2006.09661),
section 3. An image becomes a function from coordinates to pixel values, `x -> W_L sin(omega (... sin(omega (W_0 x +
b_0)) ...)) + b_L`, and its weights are what the models of this library read. Parameters have the layout of
`ngjax.mlp_spec`: `{"layer_0": {"kernel": [in, out], "bias": [out]}, "layer_1": ...}`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ngjax.trig import sincos

SirenParams: TypeAlias = Mapping[str, Mapping[str, Array | np.ndarray]]


class SirenFits(NamedTuple):
    """Networks fitted to images.

    Attributes:
      params: `{"layer_0": {"kernel": [B, in, out], "bias": [B, out]}, ...}`.
      mse: mean squared error of each network over the pixels and channels of its image.
      psnr: peak signal-to-noise ratio in dB for a peak of 1, `-10 log10(mse)`.
    """

    params: SirenParams
    mse: Float[Array, " B"]
    psnr: Float[Array, " B"]


def init_siren(key: PRNGKeyArray, sizes: Sequence[int], *, omega: float = 30.0) -> SirenParams:
    """Random parameters as in Sitzmann et al. 2020, section 3.2.

    Kernels are uniform, in `±1/fan_in` for the first layer and `±sqrt(6/fan_in)/omega` for the others, which makes the
    argument of every sine behind the first layer standard normal. The paper leaves the biases open; here they are
    uniform in `±1/sqrt(fan_in)`, PyTorch's default for linear layers, which the authors' code and the published zoos of
    SIRENs kept.

    Args:
      key: a JAX random key.
      sizes: neurons per layer, input and output included.
      omega: frequency of the sines, the same as in `apply_siren`.

    Raises:
      ValueError: fewer than two sizes, or one below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes: expected at least an input and an output size, all positive; received {tuple(sizes)}")
    params = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, layer))
        kernel_bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / omega
        bias_bound = 1 / math.sqrt(fan_in)
        params[f"layer_{layer}"] = {
            "kernel": jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-kernel_bound, maxval=kernel_bound),
            "bias": jax.random.uniform(bias_key, (fan_out,), minval=-bias_bound, maxval=bias_bound),
        }
    return params


def apply_siren(
    params: SirenParams,
    coordinates: Float[Array, "*points in"],
    *,
    omega: float = 30.0,
    output_offset: float = 0.0,
) -> Float[Array, "*points out"]:
    """The values of a SIREN: hidden layers `sin(omega (x W + b))`, the last one linear.

    Args:
      params: of one network; `vmap` over stacked ones.
      coordinates: where to evaluate it.
      omega: frequency of the sines.
      output_offset: added to the output. The published zoos of image SIRENs (Navon et al. 2023, arXiv 2301.12780)
        use 0.5, the middle of the range of pixel values.
    """
    last = len(params) - 1
    x = coordinates
    for layer in range(last):
        # `sincos` keeps the cosine, so that the backward pass computes no trigonometric function again.
        x, _ = sincos(omega * _linear(params[f"layer_{layer}"], x))
    return _linear(params[f"layer_{last}"], x) + output_offset


def _linear(layer: Mapping[str, Array | np.ndarray], x: Array) -> Array:
    # In full float32 also where the default is less: omega times this is an angle.
    return jnp.matmul(x, layer["kernel"], precision=lax.Precision.HIGHEST) + layer["bias"]


def image_coordinates(height: int, width: int) -> Float[np.ndarray, "pixels 2"]:
    """Coordinates of the pixels of an image in row-major order, each axis from -1 to 1.

    The pixel in row r and column c is at `(x_c, y_r)`, as in the published zoos.

    >>> print(image_coordinates(2, 3))
    [[-1. -1.]
     [ 0. -1.]
     [ 1. -1.]
     [-1.  1.]
     [ 0.  1.]
     [ 1.  1.]]
    """
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32)


def render(
    params: SirenParams, height: int, width: int, *, omega: float = 30.0, output_offset: float = 0.0
) -> Float[Array, "height width channels"]:
    """The image that a SIREN of two inputs represents."""
    coordinates = jnp.asarray(image_coordinates(height, width))
    return apply_siren(params, coordinates, omega=omega, output_offset=output_offset).reshape(height, width, -1)


def fit_sirens(
    initial: SirenParams,
    images: Float[Array | np.ndarray, "B height width channels"],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    omega: float = 30.0,
    output_offset: float = 0.0,
    chunk_bytes: int = 2**25,
    progress: Callable[[int, int], None] | None = None,
) -> SirenFits:
    """One SIREN per image, all fitted at once: Adam on the mean squared error over all pixels.

    Every network is fitted by itself, so the result for one does not depend on which others are fitted with it.

    Args:
      initial: where to start. Leaves with a leading axis `B` start every network from its own parameters
        (`jax.vmap(init_siren, (0, None))(keys, sizes)`), leaves without it start all of them from the same.
      images: pixel values, best in [0, 1].
      steps: of Adam, each over all pixels.
      learning_rate: of Adam.
      omega: frequency of the sines.
      output_offset: see `apply_siren`.
      chunk_bytes: how much memory activations may take. As many networks as fit go through all steps together, then
        the next ones; on CPU they should stay in cache.
      progress: called with the numbers of networks done and of all, after each chunk.

    Raises:
      ValueError: no images, images that are not finite, or parameters that do not fit to them.
    """
    images = np.asarray(images, np.float32)
    count, height, width, channels = images.shape
    if count == 0:
        raise ValueError("images: expected at least one, received none")
    if not np.isfinite(images).all():
        raise ValueError(f"images: image {np.argwhere(~np.isfinite(images))[0, 0]} has values that are not finite")
    initial = _stack(initial, count, channels)

    fit_chunk = functools.partial(
        _fit_chunk,
        jnp.asarray(image_coordinates(height, width)),
        steps=steps,
        learning_rate=learning_rate,
        omega=omega,
        output_offset=output_offset,
    )
    targets = images.reshape(count, height * width, channels)
    neurons = sum(layer["bias"].shape[-1] for layer in initial.values())
    # Sine, cosine and two cotangents of every neuron at every pixel.
    chunk = max(1, chunk_bytes // (4 * 4 * neurons * height * width))
    # Of equal size, so that one program serves all; what the last one lacks is filled with repetitions.
    chunk = math.ceil(count / math.ceil(count / chunk))
    fits = []
    for start in range(0, count, chunk):
        rows = np.arange(start, start + chunk).clip(max=count - 1)
        fits.append(fit_chunk(jax.tree.map(lambda leaf, rows=rows: leaf[rows], initial), targets[rows]))
        if progress is not None:
            jax.block_until_ready(fits[-1])
            progress(min(start + chunk, count), count)
    params, mse = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *fits)
    return SirenFits(params, mse, -10 * jnp.log10(mse))


@functools.partial(jax.jit, static_argnames=("steps", "learning_rate", "omega", "output_offset"))
def _fit_chunk(
    coordinates: Float[Array, "pixels 2"],
    params: SirenParams,
    targets: Float[Array, "B pixels channels"],
    *,
    steps: int,
    learning_rate: float,
    omega: float,
    output_offset: float,
) -> tuple[SirenParams, Float[Array, " B"]]:
    # One copy of the coordinates per network: XLA's CPU code for a product of one shared matrix with many is slower.
    coordinates = jnp.broadcast_to(coordinates, (len(targets), *coordinates.shape))
    apply = jax.vmap(functools.partial(apply_siren, omega=omega, output_offset=output_offset))
    optimizer = optax.adam(learning_rate)

    def squared_errors(params: SirenParams) -> Float[Array, " B"]:
        return jnp.mean((apply(params, coordinates) - targets) ** 2, axis=(1, 2))

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        params, adam = state
        # The gradient of the sum is every network's own gradient, and Adam acts on each parameter alone.
        gradient = jax.grad(lambda params: squared_errors(params).sum())(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, adam = optimizer.update(gradient, adam)
        return (optax.apply_updates(params, updates), adam), None

    (params, _), _ = lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params, squared_errors(params)


def _stack(initial: SirenParams, count: int, channels: int) -> SirenParams:
    """`initial` with a leading axis of size `count` on every leaf, checked against the images."""
    first, last = initial["layer_0"]["kernel"], initial[f"layer_{len(initial) - 1}"]["kernel"]
    if first.shape[-2] != 2 or last.shape[-1] != channels:
        raise ValueError(
            f"initial: expected networks with 2 inputs and {channels} outputs for images of {channels} channels, "
            f"received {first.shape[-2]} inputs and {last.shape[-1]} outputs"
        )
    if first.ndim == 2:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), initial)
    if len(first) != count:
        raise ValueError(f"initial: expected {count} networks, one per image, or a single one; received {len(first)}")
    return initial
