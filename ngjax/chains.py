"""Specs of chains of layers: described by sizes (`mlp_spec`, `cnn_spec`) or inferred from names (`infer_spec`)."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    without_value,
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
            raise ValueError(_no_chain(before, after))
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


def _no_chain(before: Layer, after: Layer) -> str:
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


# -- inferred from names and shapes ------------------------------------------------------------------------------------

# Flax and Haiku: [*taps, in, out]; Equinox and PyTorch: [out, in, *taps].
_OUT_FIRST = {"kernel": False, "w": False, "weight": True}
BIAS_NAMES = ("bias", "b")
# Of plain pytrees, whose names do not say in which order the axes of a matrix are.
_PLAIN_NAMES = re.compile(r"((?P<kernel>w|weights?|kernel)|b|bias|biases)_?(?P<number>\d*)", re.IGNORECASE)
# Layers whose kernels are laid out in other ways, or are none.
_FOREIGN_NAMES = ("transpose", "embed")
_ADVICE = (
    "trace the network's function with trace_spec, or describe the network with mlp_spec or cnn_spec, instead of "
    "infer_spec"
)


def infer_spec(params: Any, *, activation: str = "relu") -> NeuralGraphSpec:
    """Spec of an unbranched chain of convolutions and dense layers, read from names and shapes alone.

    This is the way to get a spec that *assumes*, where `trace_spec` proves. It assumes that

    * layers follow one another in natural order of their names (`Dense_2` before `Dense_10`), convolutions before
      dense layers. Where names do not tell the order by a number (`encoder` and `decoder`), the shapes have to leave
      only this one, else it is refused. Beware that Linen and Haiku number layers as they are constructed:
      `nn.Dense(8)(nn.relu(nn.Dense(8)(x)))` calls the outer one, which comes last, `Dense_0`;
    * a kernel called `kernel` (Flax Linen and NNX) or `w` (Haiku) is `[*taps, in, out]`, one called `weight` (Equinox,
      PyTorch) is `[out, in, *taps]`, and nothing is grouped;
    * pairs `(W, b)` or dicts of `W` or `w` and `b` in one list, and leaves called `W0` and `b0` side by side, are dense
      layers in the order of their numbers. Their matrices are all `[in, out]` or all `[out, in]`, whichever fits the
      biases and chains; where both do, as where all are square, it is refused;
    * what the first dense layer reads of a convolution is flattened as that library does: channels fastest in Flax and
      Haiku, positions fastest in Equinox, PyTorch and where biases are `[out, 1, 1]` (Haiku's `NCHW`). The number of
      positions follows from the sizes; 1 after global pooling;
    * there is nothing that names and shapes do not show. Residual connections, gates, weights used twice, a function
      that looks at single neurons or calls the layers in another order than their names say: such a network has fewer
      symmetries than its chain, and nothing here can notice. Trace it.

    Flat dicts with dotted names (PyTorch) or slashes are read too. Leaves may be abstract (`jax.ShapeDtypeStruct`).
    Integer and key leaves are left without a home.

    Args:
      params: the parameter pytree.
      activation: of the hidden layers, which names and shapes do not tell.

    Raises:
      ValueError: anything but such a chain, or more than one chain that it could be, naming the leaves concerned.
      TypeError: a leaf that is no array, or complex.
    """
    check_activation(activation)
    pairs, treedef = flatten_with_path(params)
    if not pairs:
        raise ValueError("expected a pytree with at least one kernel, received an empty one")
    leaves: list[ParamSpec] = []
    others: list[ParamSpec] = []
    for path, leaf in pairs:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"leaf {format_path(path)}: expected an array, received {type(leaf).__name__}")
        param = ParamSpec(path, tuple(leaf.shape), str(leaf.dtype))
        (leaves if jnp.issubdtype(leaf.dtype, jnp.inexact) else others).append(param)
    by_layer = _by_layer(leaves)
    if not by_layer:
        raise ValueError(f"expected at least one kernel, received none; {_ADVICE}")
    layers = [item.layer for item in _read_chain(by_layer)]
    return chain_spec(layers, activation=activation, order=[path for path, _ in pairs], treedef=treedef, others=others)


LayerName = tuple[str, ...]


class NamedLayer(NamedTuple):
    """A layer and the path of its container, its names taken apart."""

    name: LayerName
    layer: Layer


def _by_layer(leaves: Iterable[ParamSpec]) -> dict[LayerName, dict[str, ParamSpec]]:
    """Kernels and biases by layer; raises where a leaf is neither, or one too many."""
    layers: dict[LayerName, dict[str, ParamSpec]] = {}
    for leaf in leaves:
        where = format_path(leaf.path)
        role = role_of(leaf.path, len(leaf.shape))
        if not _fits(role, leaf.shape):
            raise ValueError(
                f"leaf {where} {leaf.shape} is not the kernel or bias of a dense layer or a convolution (expected "
                "kernel, w or weight with two to five axes, bias or b with one; or in plain pytrees W, W0 or the first "
                f"of a pair with two, and b, b0 or the second with one); {_ADVICE}"
            )
        if any(word in part.lower() for part in role.layer for word in _FOREIGN_NAMES):
            raise ValueError(
                f"leaf {where} {leaf.shape} seems to belong to a transposed convolution or an embedding, whose axes "
                f"names and shapes do not tell apart; {_ADVICE}"
            )
        assert role.slot is not None
        found = layers.setdefault(role.layer, {})
        if role.slot in found:
            raise ValueError(
                f"leaves {format_path(found[role.slot].path)} and {where} would both be the {role.slot} of one layer; "
                f"{_ADVICE}"
            )
        found[role.slot] = leaf
    return layers


class Role(NamedTuple):
    """What a leaf is, as far as its name says.

    Attributes:
      layer: names of the layer that it belongs to.
      slot: which part of that layer it is, `"kernel"` or `"bias"`, or `None`.
      is_plain: whether it is an array of a dense layer, and the order of a matrix's axes not told.
    """

    layer: LayerName
    slot: str | None
    is_plain: bool


def role_of(path: Path, rank: int = 2) -> Role:
    """The role of a leaf with so many axes."""
    *layer, name = map(str, name_parts(path) or [""])
    if name in BIAS_NAMES:
        return Role(tuple(layer), "bias", False)
    if name in _OUT_FIRST:
        # The `w` of Haiku belongs to a module, which has a name; one in a list may be anybody's.
        return Role(tuple(layer), "kernel", name == "w" and rank == 2 and bool(layer) and layer[-1].isdecimal())
    if name.isdecimal():  # in a pair
        return Role(tuple(layer), {"0": "kernel", "1": "bias"}.get(name), True)
    match = _PLAIN_NAMES.fullmatch(name)
    if match is None:
        return Role(tuple(layer), None, True)
    numbered = (*layer, match["number"]) if match["number"] else tuple(layer)
    return Role(numbered, "kernel" if match["kernel"] else "bias", True)


def _fits(role: Role, shape: Sequence[int]) -> bool:
    """Whether a leaf of this shape can be what its name says."""
    if min(shape, default=0) < 1 or role.slot is None:
        return False
    if role.is_plain:
        return len(shape) == (2 if role.slot == "kernel" else 1)
    return 2 <= len(shape) <= 5 if role.slot == "kernel" else math.prod(shape[1:]) == 1


def _read_chain(by_layer: dict[LayerName, dict[str, ParamSpec]]) -> list[NamedLayer]:
    """The layers as they follow one another.

    Raises:
      ValueError: they do not, or names and shapes leave open in which order, or with the axes of matrices in which.
    """
    kernels = {name: found["kernel"] for name, found in by_layer.items() if "kernel" in found}
    plain = sorted((name for name, leaf in kernels.items() if _is_plain(leaf)), key=natural_order)
    chains: list[list[NamedLayer]] = []
    errors: list[str] = []
    if plain:
        _check_plain(plain, kernels, ["bias" in by_layer[name] for name in plain])
    for out_first in (False, True) if plain else (False,):
        try:
            chains.append(_chained([NamedLayer(name, _layer(name, by_layer[name], out_first)) for name in by_layer]))
        except ValueError as error:
            errors.append(str(error))
    if not chains:
        both = "neither with matrices [in, out]: {}; nor with matrices [out, in]: {}"
        reason = both.format(*errors) if len(set(errors)) > 1 else errors[0]
        raise ValueError(f"{reason}; {_ADVICE}")
    if len(chains) > 1:
        first = kernels[plain[0]]
        raise ValueError(
            f"shapes do not tell whether {format_path(first.path)} {first.shape} is [in, out] or [out, in], and the "
            f"layers chain either way; in a dict for each layer, kernel is the name of one and weight of the other; or "
            f"{_ADVICE}"
        )
    (chain,) = chains
    _check_order(chain)
    _check_convolutions(chain)
    return chain


def _is_plain(leaf: ParamSpec) -> bool:
    return role_of(leaf.path, len(leaf.shape)).is_plain


def _check_plain(plain: Sequence[LayerName], kernels: Mapping[LayerName, ParamSpec], with_bias: Sequence[bool]) -> None:
    """Raises where numbers do not tell how plain layers, in natural order, follow one another.

    Shapes are not asked, as they are for other names: with the axes of matrices the other way round, layers chain in
    the other order.
    """
    for name in plain:
        if not name or not name[-1].isdecimal() or name[:-1] != plain[0][:-1]:
            raise ValueError(
                f"names do not tell where {format_path(kernels[name].path)} {kernels[name].shape} stands among the "
                f"layers: matrices without a name for the order of their axes have to be in one list, or numbered side "
                f"by side; {_ADVICE}"
            )
    for name, kernel in kernels.items():
        if name not in plain and len(kernel.shape) == 2:
            raise ValueError(
                f"names do not tell whether {format_path(kernel.path)} or {format_path(kernels[plain[0]].path)} comes "
                f"first; {_ADVICE}"
            )
    if list(with_bias) != sorted(with_bias, reverse=True):
        first = kernels[plain[with_bias.index(False)]]
        raise ValueError(
            f"{format_path(first.path)} has no bias, but a later layer has one: biases may be numbered otherwise than "
            f"matrices; {_ADVICE}"
        )


def _layer(name: LayerName, found: dict[str, ParamSpec], out_first: bool) -> Layer:
    """The layer, with plain matrices `[out, in]` or not."""
    where = "/".join(name) or "<root>"
    if "kernel" not in found:
        raise ValueError(f"layer {where} has a bias but no kernel")
    kernel, bias = found["kernel"], found.get("bias")
    if not _is_plain(kernel):
        out_first = _OUT_FIRST[name_parts(kernel.path)[-1]]
    layer = Layer(
        kernel.path,
        kernel.shape,
        None if bias is None else bias.path,
        () if bias is None else bias.shape,
        (kernel.dtype, kernel.dtype if bias is None else bias.dtype),
        out_first=out_first,
        channels_first=out_first or (bias is not None and len(bias.shape) > 1),
    )
    if bias is not None and bias.shape[0] != layer.n_out:
        raise ValueError(
            f"layer {where}: the kernel {layer.name} {kernel.shape} has {layer.n_out} outputs, but the bias has "
            f"{bias.shape[0]} entries"
        )
    if bias is not None and len(bias.shape) not in (1, 1 + len(layer.taps)):
        raise ValueError(
            f"leaf {format_path(bias.path)} {bias.shape} is not the bias of the kernel {layer.name} {kernel.shape}"
        )
    return layer


def _check_convolutions(chain: Sequence[NamedLayer]) -> None:
    """Raises where kernels with spatial axes may be something else, or are flattened in an order nobody knows."""
    convolutions = [item.layer for item in chain if item.layer.taps]
    dense = [item.layer for item in chain if not item.layer.taps]
    if not convolutions:
        return
    first, last = convolutions[0], convolutions[-1]
    orders = {layer.out_first for layer in convolutions}
    if len(orders) > 1 or len({layer.channels_first for layer in convolutions if layer.bias is not None}) > 1:
        raise ValueError(f"the convolutions {first.name} and {last.name} are not laid out alike; {_ADVICE}")
    # Networks stacked along the first axis, or the layers of nn.scan between dense ones.
    of_one_length = len({layer.shape[0] for layer in convolutions}) == 1
    could_be_stacks = of_one_length and (not dense or all(layer.n_in == layer.n_out for layer in convolutions))
    if could_be_stacks and all(layer.bias is None for layer in convolutions):
        raise ValueError(
            f"{first.name} {first.shape}: without any bias, names and shapes do not tell convolutions from layers or "
            f"networks stacked along the first axis; {_ADVICE}"
        )
    if not dense:
        return
    flattened = dense[0].n_in > last.n_out
    if flattened and last.out_first != dense[0].out_first:
        raise ValueError(
            f"{dense[0].name} {dense[0].shape} reads {dense[0].n_in // last.n_out} positions of each output of "
            f"{last.name} {last.shape}, in an order that is not known where the names of two libraries meet; {_ADVICE}"
        )
    told = any(_numbered_before(a.name, b.name) for a in chain for b in chain if a.layer.taps and not b.layer.taps)
    if not told and dense[-1].n_out % first.n_in == 0 and first.n_in >= last.n_out:
        raise ValueError(
            f"names do not tell whether {last.name} {last.shape} feeds {dense[0].name} {dense[0].shape} or "
            f"{dense[-1].name} {dense[-1].shape} feeds {first.name} {first.shape}, and both could be; {_ADVICE}"
        )


# -- order of layers ---------------------------------------------------------------------------------------------------


def _chained(layers: Sequence[NamedLayer]) -> list[NamedLayer]:
    """The layers with convolutions before dense layers, else in natural order of names; raises if they do not chain."""
    chain = sorted(layers, key=lambda item: (not item.layer.taps, natural_order(item.name)))
    for a, b in itertools.product(chain, repeat=2):
        if b.layer.taps and not a.layer.taps and _numbered_before(a.name, b.name):
            raise ValueError(f"{_no_chain(a.layer, b.layer)} (layers in natural order of their names)")
    for a, b in itertools.pairwise(chain):
        if positions_between(a.layer, b.layer) is None:
            raise ValueError(f"{_no_chain(a.layer, b.layer)} (layers in natural order of their names)")
    return chain


def _check_order(chain: Sequence[NamedLayer]) -> None:
    """Raises where the layers chain also in another order that the numbers in their names allow."""
    if all(_comes_before(a, b) for a, b in itertools.pairwise(chain)):
        return
    for order in itertools.islice(_chaining_orders(chain), 2):
        if order != tuple(range(len(chain))):
            first, second = next((chain[i], chain[j]) for i, j in enumerate(order) if i != j)
            raise ValueError(
                f"names do not tell whether {first.layer.name} {first.layer.shape} or {second.layer.name} "
                f"{second.layer.shape} comes first, and the layers chain either way; number them in their order, or "
                f"{_ADVICE}"
            )


def _comes_before(a: NamedLayer, b: NamedLayer) -> bool:
    """Whether numbers in names, or the kinds of the layers, tell that one comes before the other."""
    return bool(a.layer.taps and not b.layer.taps) or (
        bool(a.layer.taps) == bool(b.layer.taps) and _numbered_before(a.name, b.name)
    )


def _chaining_orders(layers: Sequence[NamedLayer]) -> Iterator[tuple[int, ...]]:
    """All orders in which the layers chain and each comes after those that are known to come before it."""
    count = range(len(layers))
    earlier = [{i for i in count if _comes_before(layers[i], layer)} for layer in layers]
    begun: list[tuple[int, ...]] = [()]
    while begun:
        order = begun.pop()
        if len(order) == len(layers):
            yield order
        begun += [
            (*order, i)
            for i in count
            if i not in order
            and earlier[i].issubset(order)
            and (not order or positions_between(layers[order[-1]].layer, layers[i].layer) is not None)
        ]


def _numbered_before(a: LayerName, b: LayerName) -> bool:
    """Whether a number tells that `a` comes before `b`: `Dense_2` and `Dense_10`, `linear` and `linear_1`."""
    first, second = next(((p, q) for p, q in zip(a, b, strict=False) if p != q), ("", ""))
    ours, theirs = _pieces(first), _pieces(second)
    for x, y in zip(ours, theirs, strict=False):
        if x.isdecimal() and y.isdecimal() and x != y:
            return int(x) < int(y)
        if x != y:
            break
    return len(ours) > 0 and re.fullmatch(re.escape(first) + r"[_-]?\d+", second) is not None


def natural_order(name: LayerName) -> list[tuple[int, int, str]]:
    """Sorts numbers inside names by value: `Dense_2` before `Dense_10`, and `linear` before `linear_1`."""
    key: list[tuple[int, int, str]] = []
    for part in name:
        key += [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in _pieces(part)]
        key.append((-1, 0, ""))
    return key


def _pieces(part: str) -> list[str]:
    """Numbers and what is between them."""
    return re.findall(r"[0-9]+|[^0-9]+", part)


def name_parts(path: Path) -> list[Any]:
    """Names from root to leaf: names with dots or slashes taken apart, the `value` of an NNX variable left out."""
    parts: list[Any] = []
    for step in without_value(path):
        parts += re.split(r"[./]", step.key) if isinstance(step.key, str) else [step.key]
    return parts
