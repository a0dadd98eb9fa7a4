"""Specs of chains of layers, inferred from the names and shapes of their parameters (`infer_spec`)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from ngjax.chains import Layer, chain_spec, positions_between, why_no_chain
from ngjax.spec import NeuralGraphSpec, ParamSpec, Path, check_activation, flatten_with_path, format_path, without_value

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
            raise ValueError(f"{why_no_chain(a.layer, b.layer)} (layers in natural order of their names)")
    for a, b in itertools.pairwise(chain):
        if positions_between(a.layer, b.layer) is None:
            raise ValueError(f"{why_no_chain(a.layer, b.layer)} (layers in natural order of their names)")
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
