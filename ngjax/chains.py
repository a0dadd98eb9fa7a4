"""Specs of chains of dense layers: described by their sizes (`mlp_spec`) or inferred from names (`infer_spec`)."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp

from ngjax.actions import fixed, permutation
from ngjax.spec import (
    EdgeGroup,
    NeuralGraphSpec,
    NodeGroup,
    ParamSpec,
    Path,
    PathKey,
    check_activation,
    flatten_with_path,
    format_path,
    param_view,
    path_keys,
)


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
    dtype = str(jnp.dtype(dtype))
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"an MLP needs at least two sizes, all positive; received {widths}")
    layers = [
        DenseLayer(
            kernel=(PathKey("dict", f"layer_{i}"), PathKey("dict", "kernel")),
            bias=(PathKey("dict", f"layer_{i}"), PathKey("dict", "bias")),
            kernel_shape=(n_in, n_out),
            source_axis=0,
            dtypes=(dtype, dtype),
        )
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths))
    ]
    template = {
        f"layer_{i}": {"bias": 0, "kernel": 0} for i in range(len(layers))
    }  # for the order of the leaves, which is the order of the names
    paths, treedef = flatten_with_path(template)
    return chain_spec(layers, activation=activation, order=[path for path, _ in paths], treedef=treedef)


class DenseLayer(NamedTuple):
    """One dense layer of a chain: where its kernel and bias are, and which axis of the kernel is the source."""

    kernel: Path
    bias: Path | None
    kernel_shape: tuple[int, int]
    source_axis: int
    dtypes: tuple[str, str]


def chain_spec(
    layers: Sequence[DenseLayer],
    *,
    activation: str,
    order: Sequence[Path],
    treedef: jax.tree_util.PyTreeDef | None,
    others: Sequence[ParamSpec] = (),
) -> NeuralGraphSpec:
    """Spec of an unbranched chain of dense layers.

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
    widths = [(layer.kernel_shape[layer.source_axis], layer.kernel_shape[1 - layer.source_axis]) for layer in layers]
    for (_, n_out), (n_in, _), before, after in zip(widths, widths[1:], layers, layers[1:], strict=False):
        if n_out != n_in:
            raise ValueError(
                f"layers do not chain: {format_path(before.kernel)} has {n_out} outputs, but "
                f"{format_path(after.kernel)} has {n_in} inputs"
            )
    sizes = [widths[0][0], *(n_out for _, n_out in widths)]
    last = len(layers)
    ids = ["input", *(f"hidden_{i}" for i in range(1, last)), "output"]
    actions = [
        fixed(id, n, reason=id) if id in ("input", "output") else permutation(id, n)
        for id, n in zip(ids, sizes, strict=True)
    ]
    specs = {path_keys(param.path): param for param in others}
    for i, layer in enumerate(layers):
        axes = (ids[i], ids[i + 1]) if layer.source_axis == 0 else (ids[i + 1], ids[i])
        specs[path_keys(layer.kernel)] = ParamSpec(layer.kernel, layer.kernel_shape, layer.dtypes[0], axes)
        if layer.bias is not None:
            specs[path_keys(layer.bias)] = ParamSpec(layer.bias, (sizes[i + 1],), layer.dtypes[1], (ids[i + 1],))
    params = tuple(specs[path_keys(path)] for path in order)
    index = {path_keys(param.path): i for i, param in enumerate(params)}

    nodes = [NodeGroup(ids[0], sizes[0], "input", level=0, axis=ids[0], slots=sizes[0])]
    edges = []
    for i, layer in enumerate(layers):
        is_last = i == last - 1
        n_out = sizes[i + 1]
        bias = None
        if layer.bias is not None:
            bias = param_view(index[path_keys(layer.bias)], (n_out,), target=(0,))
        nodes.append(
            NodeGroup(
                ids[i + 1],
                n_out,
                role="output" if is_last else "hidden",
                level=i + 1,
                axis=ids[i + 1],
                activation="none" if is_last else activation,
                slots=n_out if is_last else 1,
                bias=bias,
            )
        )
        view = param_view(
            index[path_keys(layer.kernel)],
            layer.kernel_shape,
            source=(layer.source_axis,),
            target=(1 - layer.source_axis,),
        )
        edges.append(EdgeGroup(format_path(layer.kernel), ids[i], ids[i + 1], view=view))
    return NeuralGraphSpec(params, tuple(nodes), tuple(edges), tuple(actions), treedef=treedef)


_KERNEL_SOURCE_AXIS = {
    "kernel": 0,
    "w": 0,
    "weight": 1,
}  # Flax, Haiku: [in, out]; Equinox, PyTorch: [out, in]
_BIAS_NAMES = ("bias", "b")
_ADVICE = "describe the network with mlp_spec, or trace its function with trace_spec, instead of infer_spec"


def infer_spec(params: Any, *, activation: str = "relu") -> NeuralGraphSpec:
    """Spec of an unbranched chain of dense layers, read from names and shapes alone.

    This is the way to get a spec that *assumes*: layers follow one another in natural order of their names (`Dense_2`
    before `Dense_10`), and a kernel called `kernel` (Flax Linen and NNX) or `w` (Haiku) is `[in, out]`, one called
    `weight` (Equinox, PyTorch) is `[out, in]`. Flat dicts with dotted names (PyTorch) or slashes are read too. Leaves
    may be abstract (`jax.ShapeDtypeStruct`). Integer and key leaves are left without a home.

    Args:
      params: the parameter pytree.
      activation: of the hidden layers, which names and shapes do not tell.

    Raises:
      ValueError: anything but such a chain, naming the leaf that does not fit.
      TypeError: a leaf that is no array, or complex.
    """
    pairs, treedef = flatten_with_path(params)
    if not pairs:
        raise ValueError("expected a pytree with at least one kernel, received an empty one")
    layers: dict[tuple[Any, ...], dict[str, tuple[Path, Any]]] = {}
    others = []
    for path, leaf in pairs:
        where = format_path(path)
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"leaf {where}: expected an array, received {type(leaf).__name__}")
        shape, dtype = tuple(leaf.shape), leaf.dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            others.append(ParamSpec(path, shape, str(dtype)))
            continue
        *prefix, name = _name_parts(path)
        slot = "bias" if name in _BIAS_NAMES else "kernel" if name in _KERNEL_SOURCE_AXIS else None
        rank = {"bias": 1, "kernel": 2}.get(slot or "")
        if slot is None or len(shape) != rank:
            raise ValueError(
                f"leaf {where} {shape} is not the kernel or bias of a dense layer (expected kernel, w or weight with "
                f"two axes, bias or b with one); {_ADVICE}"
            )
        found = layers.setdefault(tuple(map(str, prefix)), {})
        if slot in found:
            raise ValueError(
                f"leaves {format_path(found[slot][0])} and {where} would both be the {slot} of one layer; {_ADVICE}"
            )
        found[slot] = (path, leaf)
    chain = [_dense_layer(prefix, layers[prefix]) for prefix in sorted(layers, key=_natural_order)]
    if not chain:
        raise ValueError(f"expected at least one kernel, received none; {_ADVICE}")
    try:
        return chain_spec(
            chain,
            activation=activation,
            order=[path for path, _ in pairs],
            treedef=treedef,
            others=others,
        )
    except ValueError as error:
        if "do not chain" in str(error):
            raise ValueError(f"{error} (layers in natural order of their names); {_ADVICE}") from None
        raise


def _dense_layer(prefix: tuple[Any, ...], found: dict[str, tuple[Path, Any]]) -> DenseLayer:
    name = "/".join(map(str, prefix)) or "<root>"
    if "kernel" not in found:
        raise ValueError(f"layer {name} has a bias but no kernel; {_ADVICE}")
    kernel_path, kernel = found["kernel"]
    source_axis = _KERNEL_SOURCE_AXIS[_name_parts(kernel_path)[-1]]
    bias_path, bias = found.get("bias", (None, None))
    n_out = kernel.shape[1 - source_axis]
    if bias is not None and bias.shape[0] != n_out:
        raise ValueError(
            f"layer {name}: the kernel {format_path(kernel_path)} {tuple(kernel.shape)} has {n_out} outputs, but the "
            f"bias has {bias.shape[0]} entries; {_ADVICE}"
        )
    dtypes = (str(kernel.dtype), str(kernel.dtype if bias is None else bias.dtype))
    return DenseLayer(kernel_path, bias_path, tuple(kernel.shape), source_axis, dtypes)


def _name_parts(path: Path) -> list[Any]:
    """Names from root to leaf: names with dots or slashes taken apart, the `value` of an NNX variable left out."""
    steps = list(path)
    if len(steps) > 1 and steps[-1].kind == "attr" and steps[-1].key == "value":
        steps = steps[:-1]
    parts: list[Any] = []
    for step in steps:
        parts += re.split(r"[./]", step.key) if isinstance(step.key, str) else [step.key]
    return parts


def _natural_order(prefix: tuple[Any, ...]) -> list[tuple[int, int, str]]:
    """Sorts numbers inside names by value: `Dense_2` before `Dense_10`, and `linear` before `linear_1`."""
    key: list[tuple[int, int, str]] = []
    for part in prefix:
        pieces = re.findall(r"\d+|\D+", str(part))
        key += [(0, int(piece), "") if piece[0].isdigit() else (1, 0, piece) for piece in pieces]
        key.append((-1, 0, ""))
    return key
