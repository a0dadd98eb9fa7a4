"""Equations said with simpler ones: what moves a window at a known place is slices, padding and concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ngjax.trace.axes import is_pinned, is_uniform
from ngjax.trace.layers import Value
from ngjax.trace.rules import LINEAR_SCATTERS

Rewritten = tuple[Callable[..., Any], Sequence[int]]


def rewritten(eqn: Any, operands: Sequence[Value]) -> Rewritten | None:
    """A function with the equation's result, and the numbers of the operands that it takes; `None` if there is none."""
    name, shapes = eqn.primitive.name, [v.aval.shape for v in eqn.invars]
    if name == "slice":
        return _strided(eqn.params, shapes[0], operands[0])
    if name in ("dynamic_slice", "dynamic_update_slice"):
        count = 1 if name == "dynamic_slice" else 2
        if any(value.number is None for value in operands[count:]):
            return None
        sizes = eqn.params["slice_sizes"] if count == 1 else shapes[1]
        starts = _clamped([int(value.number) for value in operands[count:]], shapes[0], sizes)
        if count == 1:
            return lambda x: _sliced(x, starts, sizes), (0,)
        return lambda x, update: _replaced(x, update, starts), (0, 1)
    if name == "gather":
        return _gather(eqn.params, shapes, operands)
    if name in LINEAR_SCATTERS:
        return _scatter(name, eqn.params, shapes, operands)
    return None


def _clamped(starts: Sequence[int], shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [min(max(s, 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]


def _window_starts(
    value: Value, length: int, to: Sequence[int], shape: Sequence[int], sizes: Sequence[int]
) -> list[int] | None:
    """Where a window of `sizes` starts by an index vector that is known; `None` if it is not, or out of bounds."""
    if value.number is None:
        return None
    starts = [0] * len(shape)
    for axis, start in zip(to, np.broadcast_to(value.number, (length,)), strict=True):
        starts[axis] = int(start)
    inside = all(0 <= s <= n - k for s, n, k in zip(starts, shape, sizes, strict=True))
    return starts if inside else None


def _sliced(x: Any, starts: Sequence[int], sizes: Sequence[int]) -> Any:
    return lax.slice(x, starts, [s + n for s, n in zip(starts, sizes, strict=True)])


def _replaced(x: Any, update: Any, starts: Sequence[int]) -> Any:
    """The array with a window of it replaced: along one axis after the other, between what is before and after."""
    if x.shape == update.shape:
        return update
    axis = next(i for i in range(x.ndim) if x.shape[i] != update.shape[i])
    start, stop = starts[axis], starts[axis] + update.shape[axis]
    middle = _replaced(lax.slice_in_dim(x, start, stop, axis=axis), update, [*starts[:axis], 0, *starts[axis + 1 :]])
    parts = [lax.slice_in_dim(x, 0, start, axis=axis), middle, lax.slice_in_dim(x, stop, x.shape[axis], axis=axis)]
    return lax.concatenate([part for part in parts if part.shape[axis]], axis)


def _strided(params: Any, shape: Sequence[int], value: Value) -> Rewritten | None:
    """Every k-th place of a free axis: rows of k, and one place of each row."""
    steps = params["strides"] or (1,) * len(shape)
    starts, stops = params["start_indices"], params["limit_indices"]
    words = value.words
    free = [i for i, k in enumerate(steps) if k > 1 and not is_pinned(words[i]) and not is_uniform(words[i])]

    def is_whole(i: int) -> bool:
        count, rest = divmod(shape[i], steps[i])
        return not rest and starts[i] < steps[i] and -(-(stops[i] - starts[i]) // steps[i]) == count

    if not free or not all(map(is_whole, free)):
        return None

    def function(x: Any) -> Any:
        for axis in free:
            k = steps[axis]
            rows = x.reshape(*x.shape[:axis], x.shape[axis] // k, k, *x.shape[axis + 1 :])
            x = lax.index_in_dim(rows, starts[axis], axis + 1, keepdims=False)
        rest = [(0, n, 1) if i in free else (starts[i], stops[i], steps[i]) for i, n in enumerate(x.shape)]
        return lax.slice(x, *map(list, zip(*rest, strict=True)))

    return function, (0,)


def _gather(params: Any, shapes: Sequence[Sequence[int]], operands: Sequence[Value]) -> Rewritten | None:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(shapes[1]) != 1 or numbers.operand_batching_dims:
        return None
    starts = _window_starts(operands[1], shapes[1][0], numbers.start_index_map, shapes[0], sizes)
    if starts is None:
        return None
    return lambda x: lax.squeeze(_sliced(x, starts, sizes), numbers.collapsed_slice_dims), (0,)


def _scatter(name: str, params: Any, shapes: Sequence[Sequence[int]], operands: Sequence[Value]) -> Rewritten | None:
    numbers = params["dimension_numbers"]
    if len(shapes[1]) != 1 or numbers.operand_batching_dims:
        return None
    window = iter(shapes[2])
    sizes = [1 if axis in numbers.inserted_window_dims else next(window) for axis in range(len(shapes[0]))]
    starts = _window_starts(operands[1], shapes[1][0], numbers.scatter_dims_to_operand_dims, shapes[0], sizes)
    if starts is None:
        return None
    padding = [(s, n - s - k, 0) for s, n, k in zip(starts, shapes[0], sizes, strict=True)]

    def function(x: Any, update: Any) -> Any:
        update = lax.expand_dims(update, numbers.inserted_window_dims)
        if name == "scatter":
            return _replaced(x, update, starts)
        if name.endswith("mul"):
            return x * lax.pad(update, jnp.ones((), x.dtype), padding)
        padded = lax.pad(update, jnp.zeros((), x.dtype), padding)
        return x - padded if name.endswith("sub") else x + padded

    return function, (0, 2)


def as_jaxpr(function: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """The closed jaxpr of a rewritten equation."""
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
