"""The spec of a list of leaves: those that an optimizer sees of a network, in the order it sees them."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ngjax.infer import infer_spec, natural_order, role_of
from ngjax.spec import NeuralGraphSpec, ParamSpec, ParamView, Path, PathKey, format_path, path_keys, without_value

Shapes = tuple[tuple[int, ...], ...]


def check_leaves(spec: NeuralGraphSpec, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The number in the spec of each leaf. Leaves may be those of Linen's `params`, the spec that of all variables.

    Raises:
      ValueError: a leaf is no floating parameter of the spec, or of another shape. The spec may have more parameters.
    """
    numbers = {path_keys(without_value(param.path)): i for i, param in enumerate(spec.params) if param.is_floating}
    found = []
    for path, shape in zip(paths, shapes, strict=True):
        name = "/".join(map(str, path_keys(path))) or "<root>"
        keys = path_keys(without_value(path))
        number = numbers.get(keys, numbers.get(("params", *keys)))
        if number is None:
            raise ValueError(f"parameter {name} {shape} is not part of the spec, which has {_first_names(spec)}")
        expected = spec.params[number].shape
        if expected != shape:
            raise ValueError(f"parameter {name}: the spec expects shape {expected}, received {shape}")
        found.append(number)
    return found


def _first_names(spec: NeuralGraphSpec, count: int = 3) -> str:
    names = [format_path(param.path) for param in spec.params]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# The constructor of a spec checks it, which takes a while for a large one; an optimizer asks in every step.
@functools.lru_cache(maxsize=64)
def list_spec(spec: NeuralGraphSpec, paths: tuple[Path, ...], shapes: Shapes) -> NeuralGraphSpec:
    """The spec of the list of these leaves, in this order, without the edges and biases of other parameters.

    Raises:
      ValueError: a leaf is no floating parameter of the spec, or of another shape.
    """
    place = {number: i for i, number in enumerate(check_leaves(spec, paths, shapes))}

    def moved(view: ParamView | None) -> ParamView | None:
        return view._replace(param=place[view.param]) if view is not None and view.param in place else None

    params = [
        ParamSpec((PathKey("list", i),), spec.params[number].shape, "float32", spec.params[number].axes)
        for number, i in place.items()
    ]
    loose = [view for view in map(moved, spec.loose) if view is not None]
    return dataclasses.replace(
        spec,
        params=tuple(params),
        node_groups=tuple(group._replace(bias=moved(group.bias)) for group in spec.node_groups),
        edge_groups=tuple(
            group._replace(view=moved(group.view))
            for group in spec.edge_groups
            if group.view is None or group.view.param in place
        ),
        loose=tuple(sorted(loose, key=lambda view: view.param)),
        treedef=None,
    )


@functools.lru_cache(maxsize=64)
def inferred_spec(paths: tuple[Path, ...], shapes: Shapes, left_out: tuple[Path, ...] = ()) -> NeuralGraphSpec | None:
    """The spec of the list of these leaves, as `infer_spec` reads it off names and shapes, or `None` with a warning.

    Where a kernel is left out between others, no spec is inferred: the layers around it may seem to chain.
    """
    tree: dict[str, jax.ShapeDtypeStruct] = {
        "/".join(map(str, path_keys(path))): jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in zip(paths, shapes, strict=True)
    }
    if not tree:
        return None
    try:
        if len(tree) < len(paths):
            raise ValueError("two parameters have the same name once nested names are joined by slashes")
        _check_gaps(paths, left_out)
        spec = infer_spec(tree)
    except ValueError as error:
        warnings.warn(
            f"no graph could be inferred from names and shapes, so {_count(shapes):,} parameters are "
            "updated one by one, without what their neighbours know; pass "
            "ng_learned_opt(..., spec=ngjax.trace_spec(apply_fn, params, *inputs)), or take a rule that reads no "
            f"graph, as ng_learned_opt('ff'). The reason: {error}",
            stacklevel=4,  # who called init or update
        )
        return None
    names = tuple((PathKey("dict", name),) for name in tree)
    return list_spec(spec, names, shapes)


def _check_gaps(paths: Sequence[Path], left_out: Sequence[Path]) -> None:
    layers = [natural_order(role_of(path).layer) for path in paths]
    for path in left_out:
        role = role_of(path)
        if role.slot == "kernel" and min(layers) < natural_order(role.layer) < max(layers):
            raise ValueError(f"{format_path(path)} is masked or None, and there are parameters before and behind it")


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)
