"""SIRENs, the networks with sine activations that represent images: initialize, evaluate, render, fit.

Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", NeurIPS 2020 (arXiv 2006.09661),
section 3. An image becomes a function from coordinates to pixel values, `x -> W_L sin(omega (... sin(omega (W_0 x +
b_0)) ...)) + b_L`, and its weights are what the models of this library read. Parameters have the layout of
`ngjax.mlp_spec`: `{"layer_0": {"kernel": [in, out], "bias": [out]}, "layer_1": ...}`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ngjax.machine import available_cores
from ngjax.trig import sincos

SirenParams: TypeAlias = Mapping[str, Mapping[str, Array | np.ndarray]]
InitRule: TypeAlias = Literal["sitzmann", "dwsnets"]


class SirenFits(NamedTuple):
    """Networks fitted to images.

    Attributes:
      params: `{"layer_0": {"kernel": [B, in, out], "bias": [B, out]}, ...}`.
      mse: mean squared error of each network over the pixels and channels of its image, for pixels in [0, 1].
      psnr: peak signal-to-noise ratio in dB for a peak of 1, `-10 log10(mse)`.
      steps: how many steps of Adam each network took.
    """

    params: SirenParams
    mse: Float[Array, " B"]
    psnr: Float[Array, " B"]
    steps: Int[Array, " B"]


def init_siren(
    key: PRNGKeyArray, sizes: Sequence[int], *, omega: float = 30.0, rule: InitRule = "sitzmann"
) -> SirenParams:
    """Random parameters by one of two rules.

    `"sitzmann"` is that of Sitzmann et al. 2020, section 3.2: kernels are uniform, in `±1/fan_in` for the first layer
    and `±sqrt(6/fan_in)/omega` for the others, which makes the argument of every sine behind the first layer standard
    normal. The paper leaves the biases open; here they are uniform in `±1/sqrt(fan_in)`, PyTorch's default for linear
    layers, which the authors' code kept.

    `"dwsnets"` is that of the zoos of Navon et al. 2023 (arXiv 2301.12780), as their code has it: kernels of all sine
    layers are uniform in `±sqrt(6/fan_in)/omega`, the first one too, and their biases zero. The last layer is
    PyTorch's default, kernel and bias uniform in `±1/sqrt(fan_in)`.

    Args:
      key: a JAX random key.
      sizes: neurons per layer, input and output included.
      omega: frequency of the sines, the same as in `apply_siren`.
      rule: `"sitzmann"` or `"dwsnets"`.

    Raises:
      ValueError: fewer than two sizes, or one below 1, or an unknown rule.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes: expected at least an input and an output size, all positive; received {tuple(sizes)}")
    if rule not in typing.get_args(InitRule):
        raise ValueError(f"rule: expected one of {typing.get_args(InitRule)}, received {rule!r}")
    params = {}
    last = len(sizes) - 2
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, layer))
        sine_bound, linear_bound = math.sqrt(6 / fan_in) / omega, 1 / math.sqrt(fan_in)
        if rule == "sitzmann":
            kernel_bound, bias_bound = 1 / fan_in if layer == 0 else sine_bound, linear_bound
        else:
            kernel_bound, bias_bound = (linear_bound, linear_bound) if layer == last else (sine_bound, 0.0)
        params[f"layer_{layer}"] = {
            "kernel": jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-kernel_bound, maxval=kernel_bound),
            "bias": jax.random.uniform(bias_key, (fan_out,), minval=-bias_bound, maxval=bias_bound),
        }
    return params


def apply_siren(
    params: SirenParams,
    coordinates: Float[Array, "*points in"],
    *,
    omega: float | Float[Array, ""] = 30.0,
    output_offset: float | Float[Array, ""] = 0.0,
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
    pixel_range: tuple[float, float] = (0.0, 1.0),
    stop_psnr: float | None = None,
    chunk_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SirenFits:
    """One SIREN per image, all fitted at once: Adam on the mean squared error over all pixels.

    Every network is fitted by itself: the result for one depends neither on the others nor, up to rounding, on how
    many are fitted together.

    Args:
      initial: where to start. Leaves with a leading axis `B` start every network from its own parameters
        (`jax.vmap(init_siren, (0, None))(keys, sizes)`), leaves without it start all of them from the same.
      images: pixel values in [0, 1].
      steps: of Adam at most, each over all pixels.
      learning_rate: of Adam.
      omega: frequency of the sines.
      output_offset: see `apply_siren`.
      pixel_range: what the networks give for pixels of 0 and of 1.
      stop_psnr: a network that has reached this many dB is left as it is. `None`: all take all steps.
      chunk_bytes: how much memory the activations of a chunk may take, by default what suits the device. As many
        networks as fit go through all steps together. On CPU every core works on a chunk of its own, which should
        stay in that core's cache.
      progress: called with the numbers of networks done and of all, after each chunk.

    Raises:
      ValueError: no images, images that are not finite, parameters that do not fit to them, fewer than 0 steps, or a
        pixel range that is empty.
    """
    images = np.asarray(images, np.float32)
    count, height, width, channels = images.shape
    if count == 0:
        raise ValueError("images: expected at least one, received none")
    if not np.isfinite(images).all():
        raise ValueError(f"images: image {np.argwhere(~np.isfinite(images))[0, 0]} has values that are not finite")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, received {steps}")
    low, high = pixel_range
    if not low < high:
        raise ValueError(f"pixel_range: expected two increasing numbers, received {pixel_range}")
    stacked = _stack(initial, count, channels)
    names = [(f"layer_{layer}", kind) for layer in range(len(stacked)) for kind in ("kernel", "bias")]
    shapes = tuple(stacked[layer][kind].shape[1:] for layer, kind in names)
    start = np.concatenate([stacked[layer][kind].reshape(count, -1) for layer, kind in names], axis=1)

    coordinates = jnp.asarray(image_coordinates(height, width))
    (device,) = coordinates.devices()
    # Committed: which device is the default is known to this thread only.
    coordinates = jax.device_put(coordinates, device)
    on_cpu = device.platform == "cpu"
    if chunk_bytes is None:
        chunk_bytes = _CPU_CHUNK_BYTES if on_cpu else _ACCELERATOR_CHUNK_BYTES
    neurons = sum(shape[-1] for shape in shapes[::2])
    # Sine, cosine and two cotangents of every neuron at every pixel.
    chunk = max(1, chunk_bytes // (4 * 4 * neurons * height * width))
    # Of equal size, so that one program serves all; what the last one lacks is filled with repetitions.
    chunk = math.ceil(count / math.ceil(count / chunk))

    stop_mse = -1.0 if stop_psnr is None else (high - low) ** 2 * 10 ** (-stop_psnr / 10)

    def fit_chunk(first: int) -> tuple[np.ndarray, ...]:
        rows = np.arange(first, first + chunk).clip(max=count - 1)
        targets = low + (high - low) * images[rows].reshape(chunk, height * width, channels)
        fitted = _fit_chunk(
            coordinates,
            start[rows],
            targets,
            _Numbers(
                steps=np.asarray(steps, np.int32),
                learning_rate=np.asarray(learning_rate, np.float32),
                omega=np.asarray(omega, np.float32),
                output_offset=np.asarray(output_offset, np.float32),
                stop_mse=np.asarray(stop_mse, np.float32),
            ),
            shapes,
        )
        return jax.device_get(fitted)

    fits = []
    for part in _in_threads(fit_chunk, range(0, count, chunk), available_cores() if on_cpu else 1):
        fits.append(part)
        if progress is not None:
            progress(min(len(fits) * chunk, count), count)
    flat, mse, taken = (np.concatenate(parts)[:count] for parts in zip(*fits, strict=True))
    params: dict[str, dict[str, Array]] = {layer: {} for layer, _ in names}
    for (layer, kind), leaf in zip(names, _unflatten(jnp.asarray(flat), shapes), strict=True):
        params[layer][kind] = leaf
    pixel_mse = jnp.asarray(mse / np.float32(high - low) ** 2)
    return SirenFits(params, pixel_mse, -10 * jnp.log10(pixel_mse), jnp.asarray(taken))


_CPU_CHUNK_BYTES = 2**22  # about the second-level cache of a core
_ACCELERATOR_CHUNK_BYTES = 2**32


def _in_threads(function: Callable[[int], tuple], arguments: Sequence[int], workers: int) -> Iterator[tuple]:
    """Results in order. XLA leaves cores idle between the small operations of a chunk; another chunk can use them."""
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield from executor.map(function, arguments)
    finally:
        executor.shutdown(cancel_futures=True)


class _Numbers(NamedTuple):
    """Numbers of `fit_sirens` as arrays without axes: one program serves all."""

    steps: Int[Array | np.ndarray, ""]
    learning_rate: Float[Array | np.ndarray, ""]
    omega: Float[Array | np.ndarray, ""]
    output_offset: Float[Array | np.ndarray, ""]
    stop_mse: Float[Array | np.ndarray, ""]


class _State(NamedTuple):
    """Where the networks of a chunk are.

    Attributes:
      params: all weights of a network side by side, so that a step of Adam is one operation.
      mean: of the gradients, as Adam keeps it.
      square: of the gradients, likewise.
      going: networks that have not stopped.
      taken: steps that each network took.
      step: steps that those took which go on.
    """

    params: Float[Array, "B weights"]
    mean: Float[Array, "B weights"]
    square: Float[Array, "B weights"]
    going: Bool[Array, " B"]
    taken: Int[Array, " B"]
    step: Int[Array, ""]


@functools.partial(jax.jit, static_argnums=4)
def _fit_chunk(
    coordinates: Float[Array, "pixels 2"],
    params: Float[Array | np.ndarray, "B weights"],
    targets: Float[Array | np.ndarray, "B pixels channels"],
    numbers: _Numbers,
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[Float[Array, "B weights"], Float[Array, " B"], Int[Array, " B"]]:
    # One copy of the coordinates per network: XLA's CPU code for a product of one shared matrix with many is slower.
    coordinates = jnp.broadcast_to(coordinates, (len(targets), *coordinates.shape))
    omega, offset = jnp.asarray(numbers.omega), jnp.asarray(numbers.output_offset)
    apply = jax.vmap(functools.partial(apply_siren, omega=omega, output_offset=offset))

    def squared_errors(params: Array) -> Float[Array, " B"]:
        leaves = _unflatten(params, shapes)
        layers = {
            f"layer_{i}": {"kernel": kernel, "bias": bias}
            for i, (kernel, bias) in enumerate(zip(leaves[::2], leaves[1::2], strict=True))
        }
        return jnp.mean((apply(layers, coordinates) - targets) ** 2, axis=(1, 2))

    def total(params: Array) -> tuple[Array, Array]:
        errors = squared_errors(params)
        return errors.sum(), errors

    def step(state: _State) -> _State:
        # The gradient of the sum is every network's own gradient, and Adam acts on each parameter alone.
        gradient, errors = jax.grad(total, has_aux=True)(state.params)
        going = state.going & ~(errors <= numbers.stop_mse)  # what is not a number goes on
        count = (state.step + 1).astype(np.float32)
        mean = _BETA_1 * state.mean + (1 - _BETA_1) * gradient
        square = _BETA_2 * state.square + (1 - _BETA_2) * gradient**2
        unbiased_mean = mean / -jnp.expm1(count * math.log(_BETA_1))
        unbiased_square = square / -jnp.expm1(count * math.log(_BETA_2))
        move = numbers.learning_rate * unbiased_mean / (jnp.sqrt(unbiased_square) + _EPSILON)
        params = jnp.where(going[:, None], state.params - move, state.params)
        return _State(params, mean, square, going, state.taken + going.astype(np.int32), state.step + 1)

    def is_going(state: _State) -> Array:
        return (state.step < jnp.asarray(numbers.steps)) & state.going.any()

    zeros, going = jnp.zeros_like(params), jnp.ones(len(targets), bool)
    start = _State(jnp.asarray(params), zeros, zeros, going, jnp.zeros(len(targets), np.int32), jnp.int32(0))
    end = lax.while_loop(is_going, step, start)
    return end.params, squared_errors(end.params), end.taken


# Adam's own defaults (Kingma and Ba, 2015).
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


def _unflatten(flat: Array, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """The arrays of these shapes that lie side by side in each row."""
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    return [
        flat[:, start:end].reshape(len(flat), *shape)
        for (start, end), shape in zip(itertools.pairwise([0, *ends]), shapes, strict=True)
    ]


def _stack(initial: SirenParams, count: int, channels: int) -> dict[str, dict[str, np.ndarray]]:
    """`initial` with a leading axis of size `count` on every leaf, checked against the images."""
    arrays = {name: {kind: np.asarray(leaf) for kind, leaf in layer.items()} for name, layer in initial.items()}
    first, last = arrays["layer_0"]["kernel"], arrays[f"layer_{len(arrays) - 1}"]["kernel"]
    if first.shape[-2] != 2 or last.shape[-1] != channels:
        raise ValueError(
            f"initial: expected networks with 2 inputs and {channels} outputs for images of {channels} channels, "
            f"received {first.shape[-2]} inputs and {last.shape[-1]} outputs"
        )
    if first.ndim == 2:
        return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), arrays)
    if len(first) != count:
        raise ValueError(f"initial: expected {count} networks, one per image, or a single one; received {len(first)}")
    return arrays
