"""Which entries of which parameters an intermediate array of a program holds: strided windows of flat parameters.

Between a parameter and the product that uses it stand transpositions, reshapes, slices, casts and concatenations. Each
keeps the array a window of the parameter whose axes are made of strided factors; what cannot be followed is dropped,
and the parameter then gets its place in the graph another way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Factors: TypeAlias = tuple[tuple[int, int], ...]  # (size, stride in the flat parameter), row-major; stride 0 repeats


class Window(NamedTuple):
    """Entries of parameter number `param` inside an array: per axis where they start, and their factors."""

    param: int
    offset: int
    axes: tuple[Factors, ...]
    starts: tuple[int, ...]

    def extent(self, axis: int) -> int:
        return math.prod(size for size, _ in self.axes[axis])

    def varies(self, axis: int) -> bool:
        return any(stride for _, stride in self.axes[axis])

    def flat(self, axis: int) -> np.ndarray:
        """Distances in the flat parameter of the window's places along an axis from its first, `[extent]`."""
        total = np.zeros(1, np.int64)
        for size, stride in self.axes[axis]:
            total = (total[:, None] + np.arange(size) * stride).reshape(-1)
        return total


def whole(param: int, shape: Sequence[int]) -> Window:
    """The window that is a whole parameter."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axes = tuple(((n, stride),) if n > 1 else () for n, stride in zip(shape, strides, strict=True))
    return Window(param, 0, axes, (0,) * len(shape))


def transposed(window: Window, permutation: Sequence[int]) -> Window:
    """Its axes in another order."""
    return window._replace(
        axes=tuple(window.axes[i] for i in permutation), starts=tuple(window.starts[i] for i in permutation)
    )


def broadcast(window: Window, shape: Sequence[int], to: Sequence[int], old: Sequence[int]) -> Window:
    """Repeated along new axes, and along those of size one."""
    axes: list[Factors] = [((n, 0),) if n > 1 else () for n in shape]
    starts = [0] * len(shape)
    for axis, place in enumerate(to):
        if old[axis] == shape[place]:
            axes[place], starts[place] = window.axes[axis], window.starts[axis]
    return window._replace(axes=tuple(axes), starts=tuple(starts))


def squeezed(window: Window, dimensions: Sequence[int]) -> Window:
    """Axes of size one left out."""
    keep = [i for i in range(len(window.axes)) if i not in dimensions]
    return transposed(window, keep)


def axis_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of a reshape in groups of equal size, in order; axes of size one are left out."""
    left, right = [i for i, n in enumerate(old) if n != 1], [j for j, n in enumerate(new) if n != 1]
    groups, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        mine, theirs = [left[i]], [right[j]]
        a, b = old[left[i]], new[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                mine.append(left[i])
                a *= old[left[i]]
                i += 1
            else:
                theirs.append(right[j])
                b *= new[right[j]]
                j += 1
        groups.append((mine, theirs))
    return groups


def reshaped(window: Window, old: Sequence[int], new: Sequence[int]) -> Window | None:
    """With its factors dealt out to new axes; `None` where they do not fit."""
    axes: list[Factors] = [()] * len(new)
    starts = [0] * len(new)
    for mine, theirs in axis_groups(old, new):
        if len(mine) == len(theirs) == 1:
            axes[theirs[0]], starts[theirs[0]] = window.axes[mine[0]], window.starts[mine[0]]
            continue
        if any(window.extent(i) != old[i] for i in mine):
            return None
        left = [factor for i in mine for factor in window.axes[i]]
        for place in theirs:
            taken, need = [], new[place]
            while need > 1:
                size, stride = left.pop(0)
                if need % size == 0:
                    taken.append((size, stride))
                    need //= size
                elif size % need == 0:
                    taken.append((need, stride * (size // need)))
                    left.insert(0, (size // need, stride))
                    need = 1
                else:
                    return None
            axes[place] = tuple(taken)
    return window._replace(axes=tuple(axes), starts=tuple(starts))


def sliced(window: Window, axis: int, start: int, stop: int, step: int = 1) -> Window | None:
    """The part of a window between two places of the array along one axis; `None` if there is none or it is ragged."""
    lo, n = window.starts[axis], window.extent(axis)
    first, last = max(start, lo) - lo, min(stop, lo + n) - lo
    if last <= first:
        return None
    if step != 1:
        if (lo, n) != (0, stop) or start or len(window.axes[axis]) != 1:
            return None
        ((size, stride),) = window.axes[axis]
        axes, offset, new_start = ((-(-size // step), stride * step),), window.offset, 0
        return _with_axis(window, axis, axes, offset, new_start)
    new_start = max(lo, start) - start
    if (first, last) == (0, n):
        return _with_axis(window, axis, window.axes[axis], window.offset, new_start)
    (size, stride), *rest = window.axes[axis]
    inner = math.prod(k for k, _ in rest)
    if first % inner or last % inner:
        if first // inner == (last - 1) // inner:  # inside one row
            row = _with_axis(window, axis, tuple(rest), window.offset + first // inner * stride, 0)
            base = first // inner * inner
            part = sliced(row, axis, first - base, last - base)
            return None if part is None else _with_axis(part, axis, part.axes[axis], part.offset, new_start)
        return None
    count = (last - first) // inner
    outer = ((count, stride),) if count > 1 else ()
    return _with_axis(window, axis, (*outer, *rest), window.offset + first // inner * stride, new_start)


def _with_axis(window: Window, axis: int, factors: Factors, offset: int, start: int) -> Window:
    axes = (*window.axes[:axis], factors, *window.axes[axis + 1 :])
    return window._replace(axes=axes, offset=offset, starts=(*window.starts[:axis], start, *window.starts[axis + 1 :]))


def shifted(window: Window, axis: int, by: int) -> Window:
    """At other places of an array along one axis."""
    starts = (*window.starts[:axis], window.starts[axis] + by, *window.starts[axis + 1 :])
    return window._replace(starts=starts)


# -- arrays that hold, at each place, the number of a neuron -----------------------------------------------------------
#
# Axes along which they do not vary have length one.


def axes_of(ids: np.ndarray) -> tuple[int, ...]:
    """The axes along which the neurons differ."""
    return tuple(i for i, n in enumerate(ids.shape) if n > 1)


def reshape_ids(ids: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Numbers of neurons in an array of another shape with the same entries."""
    full, shape = list(ids.shape), [1] * len(new)
    for mine, theirs in axis_groups(old, new):
        if any(ids.shape[i] > 1 for i in mine):
            for i in mine:
                full[i] = old[i]
            for j in theirs:
                shape[j] = new[j]
    return np.broadcast_to(ids, full).reshape(shape)


def factorize(vectors: np.ndarray) -> list[tuple[int, tuple[int, ...]]] | None:
    """The factors of an axis along which several numbers are sums of multiples of the factors' places.

    Args:
      vectors: `[k, n]`, the k numbers at each place.

    Returns:
      For each factor its size and the k multiples, outermost first; `None` where there are none such.
    """
    k, n = vectors.shape
    if n == 1:
        return []
    steps = np.diff(vectors, axis=1)
    different = np.flatnonzero(np.any(steps != steps[:, :1], axis=0))
    run = n if different.size == 0 else int(different[0]) + 1
    while run > 1:
        if n % run == 0:
            rows = vectors.reshape(k, n // run, run)
            if np.array_equal(rows - rows[:, :, :1], np.broadcast_to(rows[:, :1] - rows[:, :1, :1], rows.shape)):
                outer = factorize(np.ascontiguousarray(rows[:, :, 0]))
                if outer is not None:
                    return [*outer, (run, tuple(int(x) for x in steps[:, 0]))]
        run -= 1
    return None


def all_pieces(keys: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """Boxes on each of which the keys of every axis (`[n, ...]`) are constant: for each box the places per axis."""
    per_axis = []
    for key in keys:
        _, number = np.unique(key, axis=0, return_inverse=True)
        number = number.reshape(-1)
        order = list(dict.fromkeys(number.tolist()))
        per_axis.append([np.flatnonzero(number == value) for value in order])
    return list(itertools.product(*per_axis))
