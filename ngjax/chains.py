"""Specs of chains of layers: described by sizes (`mlp_spec`, `cnn_spec`), or built from layers (`chain_spec`)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp

from ngjax.actions import AxisAction, fixed, permutation, product
from ngjax.spec import (
    EdgeGroup,
    NeuralGraphSpec,
    NodeGroup,
    ParamSpec,
    ParamView,
    Path,
    PathKey,
    check_activation,
    flatten_with_path,
    format_path,
    param_view,
    path_keys,
)

# -- described by sizes ------------------------------------------------------------------------------------------------


def mlp_spec(sizes: Iterable[SupportsIndex], *, activation: str = "relu", dtype: Any = "float32") -> NeuralGraphSpec:
    """Spec of an MLP with parameters `{"layer_0": {"kernel": [n_0, n_1], "bias": [n_1]}, "layer_1": ...}`.

    Args:
      sizes: widths `n_0, ..., n_L` from inputs to outputs.
      activation: of the hidden layers, one of `ACTIVATIONS`; the output is linear. A SIREN has `"siren"`.
      dtype: of the parameters.

    Raises:
      ValueError: fewer than two sizes, a size below one, an unknown activation.
    """
    widths = tuple(operator.index(n) for n in sizes)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"an MLP needs at least two sizes, all positive; received {widths}")
    return _numbered(list(itertools.pairwise(widths)), activation=activation, dtype=dtype)


def cnn_spec(
    channels: Iterable[SupportsIndex],
    *,
    kernel_size: Iterable[SupportsIndex] | Iterable[Iterable[SupportsIndex]],
    dense: Iterable[SupportsIndex] = (),
    positions: SupportsIndex = 1,
    activation: str = "relu",
    dtype: Any = "float32",
) -> NeuralGraphSpec:
    """Spec of convolutions one after the other, then dense layers, all of them numbered.

    The parameters are `{"layer_0": {"kernel": [*kernel_size, c_0, c_1], "bias": [c_1]}, ...}` for the convolutions,
    and go on with `{"layer_L": {"kernel": [positions * c_L, n_1], "bias": [n_1]}, ...}` for the dense layers.
    Strides, padding and pooling do not show. A small network for images of 28 x 28 pixels, pooled twice by two:
    `cnn_spec((1, 16, 32), kernel_size=(3, 3), dense=(64, 10), positions=7 * 7)`.

    Args:
      channels: `c_0, ..., c_L` from the image to the last convolution.
      kernel_size: the shape of every kernel (one to three spatial axes), or a list with a shape for each convolution.
      dense: widths `n_1, ..., n_M` of the dense layers, the last of them the outputs. Without any, the channels of the
        last convolution are the outputs.
      positions: pixels of each channel that the first dense layer reads, flattened with the channels fastest, as Flax
        and Haiku do; 1 after global pooling.
      activation: of the hidden layers, one of `ACTIVATIONS`; the output is linear.
      dtype: of the parameters.

    Raises:
      ValueError: no convolution, a size below one, a number of kernel shapes that is not that of the convolutions,
        positions without a dense layer, an unknown activation.
    """
    planes = tuple(operator.index(n) for n in channels)
    if len(planes) < 2 or min(planes) < 1:
        raise ValueError(
            f"a convolutional network needs at least two numbers of channels, all positive; received {planes}"
        )
    kernels = _kernel_shapes(kernel_size, len(planes) - 1)
    widths, pixels = tuple(operator.index(n) for n in dense), operator.index(positions)
    if min(widths, default=1) < 1 or pixels < 1:
        raise ValueError(f"expected positive widths and positions; received dense={widths}, positions={pixels}")
    if pixels > 1 and not widths:
        raise ValueError(f"positions are read by the first dense layer; received positions={pixels} without dense")
    convolutions = [(*kernel, *ends) for kernel, ends in zip(kernels, itertools.pairwise(planes), strict=True)]
    inputs = (planes[-1] * pixels, *widths)
    return _numbered([*convolutions, *itertools.pairwise(inputs)], activation=activation, dtype=dtype)


def _kernel_shapes(kernel_size: Iterable[Any], count: int) -> list[tuple[int, ...]]:
    """One shape for each convolution, of one shape for all or of as many as there are."""
    if not isinstance(kernel_size, Iterable):
        raise TypeError(f"expected a kernel size with one number for each spatial axis, received {kernel_size!r}")
    items = list(kernel_size)
    shapes = [tuple(item) for item in items if isinstance(item, Iterable)]
    if not shapes:
        shapes = [tuple(items)] * count
    elif len(shapes) != len(items) or len(items) != count:
        raise ValueError(f"expected one kernel shape, or one for each of {count} convolutions; received {items}")
    sizes = [tuple(operator.index(n) for n in shape) for shape in shapes]
    for shape in sizes:
        if not 1 <= len(shape) <= 3 or min(shape) < 1 or len(shape) != len(sizes[0]):
            raise ValueError(
                f"expected kernels of one to three spatial axes, as many in all of them, all positive; received {sizes}"
            )
    return sizes


def _numbered(shapes: Sequence[tuple[int, ...]], *, activation: str, dtype: Any) -> NeuralGraphSpec:
    """Spec of layers `layer_0`, `layer_1`, ... with biases and kernels of these shapes, `[*taps, in, out]`."""
    dtype = str(jnp.dtype(dtype))
    names = [f"layer_{i}" for i in range(len(shapes))]
    layers = [
        Layer(
            kernel=(PathKey("dict", name), PathKey("dict", "kernel")),
            shape=shape,
            bias=(PathKey("dict", name), PathKey("dict", "bias")),
            bias_shape=shape[-1:],
            dtypes=(dtype, dtype),
        )
        for name, shape in zip(names, shapes, strict=True)
    ]
    # For the order of the leaves, which is the order of the names.
    paths, treedef = flatten_with_path({name: {"bias": 0, "kernel": 0} for name in names})
    return chain_spec(layers, activation=activation, order=[path for path, _ in paths], treedef=treedef)


# -- chains ------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution or dense layer of a chain.

    Attributes:
      kernel: path of the kernel.
      shape: of the kernel, `[*taps, in, out]`, or `[out, in, *taps]` where `out_first`; a dense layer has no taps.
      bias: path of the bias, if there is one.
      bias_shape: `[out]`, or `[out, 1, ...]`.
      dtypes: of kernel and bias.
      out_first: the order of the kernel's axes.
      channels_first: where what it makes is flattened, whether the positions (and not the channels) are fastest.
    """

    kernel: Path
    shape: tuple[int, ...]
    bias: Path | None
    bias_shape: tuple[int, ...]
    dtypes: tuple[str, str]
    out_first: bool = False
    channels_first: bool = False

    @property
    def source_axis(self) -> int:
        return 1 if self.out_first else len(self.shape) - 2

    @property
    def target_axis(self) -> int:
        return 0 if self.out_first else len(self.shape) - 1

    @property
    def taps(self) -> tuple[int, ...]:
        """Shape of the kernel's spatial axes."""
        return self.shape[2:] if self.out_first else self.shape[:-2]

    @property
    def n_in(self) -> int:
        return self.shape[self.source_axis]

    @property
    def n_out(self) -> int:
        return self.shape[self.target_axis]

    @property
    def name(self) -> str:
        return format_path(self.kernel)


def positions_between(before: Layer, after: Layer) -> int | None:
    """Pixels of each output of one layer that the next one reads as an input of its own; `None` if they do not chain.

    More than one only where a dense layer follows a convolution; convolutions do not follow dense layers.
    """
    if len(before.taps) != len(after.taps) and (after.taps or not before.taps):
        return None
    if before.taps and not after.taps:
        return after.n_in // before.n_out if after.n_in % before.n_out == 0 else None
    return 1 if before.n_out == after.n_in else None


def chain_spec(
    layers: Sequence[Layer],
    *,
    activation: str,
    order: Sequence[Path],
    treedef: jax.tree_util.PyTreeDef | None,
    others: Sequence[ParamSpec] = (),
) -> NeuralGraphSpec:
    """Spec of an unbranched chain of convolutions and, after them, dense layers.

    Args:
      layers: from input to output.
      activation: of the hidden layers.
      order: paths of all leaves in the order of `treedef`.
      treedef: of the pytree.
      others: leaves without a home (not floating).

    Raises:
      ValueError: shapes that do not chain, an unknown activation.
    """
    check_activation(activation)
    positions = [1]
    for before, after in itertools.pairwise(layers):
        between = positions_between(before, after)
        if between is None:
            raise ValueError(why_no_chain(before, after))
        positions.append(between)
    sizes = [layers[0].n_in, *(layer.n_out for layer in layers)]
    last = len(layers)
    ids = ["input", *(f"hidden_{i}" for i in range(1, last)), "output"]
    neurons = [_neurons(id, n) for id, n in zip(ids, sizes, strict=True)]
    channels_first = any(layer.channels_first for layer in layers if layer.taps)
    built: dict[str, AxisAction] = {}  # of axes that are not just neurons
    specs = {path_keys(param.path): param for param in others}
    for layer, pixels, source, target in zip(layers, positions, neurons, neurons[1:], strict=False):
        axes = _kernel_axes(layer, pixels, source, target, channels_first=channels_first)
        specs[path_keys(layer.kernel)] = ParamSpec(layer.kernel, layer.shape, layer.dtypes[0], _ids(axes))
        if layer.bias is not None:
            ones = [fixed("size_1", 1, reason="size one")] * (len(layer.bias_shape) - 1)
            axes += [[target], *([one] for one in ones)]
            specs[path_keys(layer.bias)] = ParamSpec(
                layer.bias, layer.bias_shape, layer.dtypes[1], (target.id, *(one.id for one in ones))
            )
        built |= {action.id: action for axis in axes for action in axis if action not in neurons}
    params = tuple(specs[path_keys(path)] for path in order)
    index = {path_keys(param.path): i for i, param in enumerate(params)}

    nodes = [NodeGroup(ids[0], sizes[0], "input", level=0, axis=ids[0], slots=sizes[0])]
    edges = []
    for i, (layer, pixels) in enumerate(zip(layers, positions, strict=True)):
        is_last = i == last - 1
        bias = None
        if layer.bias is not None:
            axes_of_bias = range(len(layer.bias_shape))
            bias = param_view(index[path_keys(layer.bias)], layer.bias_shape, target=axes_of_bias)
        nodes.append(
            NodeGroup(
                ids[i + 1],
                layer.n_out,
                role="output" if is_last else "hidden",
                level=i + 1,
                axis=ids[i + 1],
                activation="none" if is_last else activation,
                slots=layer.n_out if is_last else 1,
                bias=bias,
            )
        )
        view = _kernel_view(index[path_keys(layer.kernel)], layer, pixels, channels_first=channels_first)
        edges.append(EdgeGroup(layer.name, ids[i], ids[i + 1], view=view))
    return NeuralGraphSpec(params, tuple(nodes), tuple(edges), (*neurons, *built.values()), treedef=treedef)


def why_no_chain(before: Layer, after: Layer) -> str:
    """What is wrong with two layers for which `positions_between` is `None`."""
    if after.taps and not before.taps:
        return f"layers do not chain: the convolution {after.name} {after.shape} follows the dense layer {before.name}"
    if after.taps and len(after.taps) != len(before.taps):
        return (
            f"layers do not chain: {before.name} {before.shape} has {len(before.taps)} spatial axes, but {after.name} "
            f"{after.shape} has {len(after.taps)}"
        )
    multiple = ", which is no multiple" if before.taps and not after.taps else ""
    grouped = after.taps and before.n_out % after.n_in == 0
    return (
        f"layers do not chain: {before.name} has {before.n_out} outputs, but {after.name} has {after.n_in} inputs"
        + multiple
        + (f" (a convolution in {before.n_out // after.n_in} groups or by depth?)" if grouped else "")
    )


def _neurons(id: str, size: int) -> AxisAction:
    if id in ("input", "output"):
        return fixed(id, size, reason=id)
    return permutation(id, size) if size > 1 else fixed(id, size, reason="size one")


def _ids(axes: Iterable[Sequence[AxisAction]]) -> tuple[str, ...]:
    return tuple(axis[-1].id for axis in axes)


def _kernel_axes(
    layer: Layer, positions: int, source: AxisAction, target: AxisAction, *, channels_first: bool
) -> list[list[AxisAction]]:
    """For each axis of the kernel its action, after those that it is built from."""
    axes = [[fixed(f"{layer.name}:{axis}", n, reason="kernel position")] for axis, n in enumerate(layer.shape)]
    axes[layer.target_axis] = [target]
    axes[layer.source_axis] = [source]
    if positions > 1:
        pixels = fixed(f"{layer.name}:positions", positions, reason="position")
        parts = [source, pixels] if channels_first else [pixels, source]
        axes[layer.source_axis] = [*parts, product(f"{layer.name}:{layer.source_axis}", parts)]
    return axes


def _kernel_view(param: int, layer: Layer, positions: int, *, channels_first: bool) -> ParamView:
    """The kernel as `[1, source, target, taps]`; the positions of a flattened input are its taps."""
    if positions == 1:
        taps = [a for a in range(len(layer.shape)) if a not in (layer.source_axis, layer.target_axis)]
        return param_view(param, layer.shape, source=[layer.source_axis], target=[layer.target_axis], kernel=taps)
    channels = layer.n_in // positions
    split = (channels, positions) if channels_first else (positions, channels)
    first, second = layer.source_axis, layer.source_axis + 1
    source, kernel = (first, second) if channels_first else (second, first)
    target = 0 if layer.out_first else 2
    splits = {layer.source_axis: split}
    return param_view(param, layer.shape, source=[source], target=[target], kernel=[kernel], splits=splits)
