"""How the axes of weights move when neurons are shuffled.

An `AxisAction` is a rule for one axis. Independent permutations are the letters of a small language; the words are

* `product`: the row-major product of other axes (heads x inner dimension, groups x channels of a group, positions x
  channels after a flatten),
* `concat`: axes one after the other (DenseNet features, fused query/key/value, the gates of a cell),
* `stack`: another axis for each place along a third one (the slices of a stacked weight).

A permutation may itself be another one at each place along other axes (`per`: the inner dimension of each head). What
an axis depends on is found either in the same word (a product knows the places along all of its parts) or on another
axis of the same parameter.

Everything here is a function of *new places*: a permuted weight is `new[i] = old[old_places(i)]`. Places are static
numpy arrays; only the permutations themselves may be traced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["permutation", "fixed", "product", "concat", "stack"]


class AxisAction(NamedTuple):
    """How an axis moves under a permutation of neurons.

    Attributes:
      id: unique name.
      size: length of the axis.
      kind: `permutation` (an independent one), `fixed` (pinned), `product`, `concat` or `stack` of `parts`.
      parts: ids of the actions it is built from.
      per: ids on whose places it depends: any for a permutation, exactly one for a stack.
      reason: what pinned it, for `fixed`.
    """

    id: str
    size: int
    kind: Kind
    parts: tuple[str, ...] = ()
    per: tuple[str, ...] = ()
    reason: str = ""


Actions = Mapping[str, AxisAction]
Lookup = Callable[[str], Any]


def permutation(id: str, size: int, *, per: Iterable[AxisAction] = ()) -> AxisAction:
    """An independent permutation of `size` neurons, another one for each place along the axes `per`."""
    return AxisAction(id, size, "permutation", per=tuple(action.id for action in per))


def fixed(id: str, size: int, reason: str) -> AxisAction:
    """An axis that nothing moves, and why."""
    return AxisAction(id, size, "fixed", reason=reason)


def product(id: str, parts: Sequence[AxisAction]) -> AxisAction:
    """The row-major product of the parts' axes."""
    return AxisAction(id, math.prod(p.size for p in parts), "product", parts=tuple(p.id for p in parts))


def concat(id: str, parts: Sequence[AxisAction]) -> AxisAction:
    """The parts' axes one after the other; a part may come several times and then moves the same way each time."""
    return AxisAction(id, sum(p.size for p in parts), "concat", parts=tuple(p.id for p in parts))


def stack(id: str, parts: Sequence[AxisAction], *, per: AxisAction) -> AxisAction:
    """The axis that moves as `parts[l]` does at place `l` along the axis `per`; parts may come several times."""
    return AxisAction(id, parts[0].size, "stack", parts=tuple(p.id for p in parts), per=(per.id,))


def check_actions(actions: Sequence[AxisAction]) -> None:
    """Raises a ValueError where ids clash, come before what they are built from, or have sizes that do not fit."""
    known: dict[str, AxisAction] = {}
    for item in actions:
        if item.id in known:
            raise ValueError(f"two actions share the id {item.id!r}")
        unknown = [id for id in (*item.parts, *item.per) if id not in known]
        if unknown:
            raise ValueError(f"action {item.id!r} names {unknown}, which are not among the actions before it")
        if item.size < 1:
            raise ValueError(f"action {item.id!r} has size {item.size}; expected a positive one")
        sizes = [known[part].size for part in item.parts]
        if item.kind in ("permutation", "fixed"):
            fits, expected = not item.parts, "no parts"
        elif item.kind == "product":
            fits, expected = math.prod(sizes) == item.size, f"size {math.prod(sizes)}"
        elif item.kind == "concat":
            fits, expected = sum(sizes) == item.size, f"size {sum(sizes)}"
        elif item.kind == "stack":
            fits = len(item.per) == 1 and [item.size] * known[item.per[0]].size == sizes
            expected = "one part of its own size for each place along the one id in per"
        else:
            fits, expected = False, "one of the kinds permutation, fixed, product, concat and stack"
        if not fits or (item.per and item.kind not in ("permutation", "stack")):
            raise ValueError(
                f"action {item.id!r} of kind {item.kind} has size {item.size}, parts of sizes {sizes}, per {item.per}"
                f"; expected {expected if not fits else 'no per'}"
            )
        known[item.id] = item
        if item.kind == "product":
            _check_siblings(known, item)


def _check_siblings(actions: Actions, item: AxisAction) -> None:
    for i, part in enumerate(item.parts):
        siblings = (*item.parts[:i], *item.parts[i + 1 :])
        for needed in itertools.chain(*dependencies(actions, part)):
            if sum(_count(actions, sibling, needed) for sibling in siblings) > 1:
                raise ValueError(
                    f"action {item.id!r}: part {part!r} depends on {needed!r}, which is there several times"
                )


def is_free(actions: Actions, id: str) -> bool:
    """Whether anything moves along an axis with this action."""
    action = actions[id]
    return action.kind == "permutation" or any(is_free(actions, part) for part in action.parts)


def letters(actions: Actions, id: str) -> tuple[str, ...]:
    """The independent permutations and pinned axes that an action is built from, each once, in order."""
    action = actions[id]
    if not action.parts:
        return (id,)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(letters(actions, part) for part in action.parts)))


def dependencies(actions: Actions, id: str) -> tuple[tuple[str, ...], ...]:
    """What has to be known from elsewhere to tell how an axis with this action moves: the places along these ids.

    Ids in one group stand for one another: at each place along a stack only one of them counts.
    """
    action = actions[id]
    by_part = [dependencies(actions, part) for part in action.parts]
    if action.kind == "stack":
        merged = [
            tuple(dict.fromkeys(itertools.chain(*groups))) for groups in itertools.zip_longest(*by_part, fillvalue=())
        ]
        return tuple(dict.fromkeys([action.per, *merged]))
    groups: list[tuple[str, ...]] = [(id,) for id in action.per]
    for i, needed in enumerate(by_part):
        siblings = (*action.parts[:i], *action.parts[i + 1 :]) if action.kind == "product" else ()
        unbound = [tuple(d for d in group if not any(_count(actions, s, d) for s in siblings)) for group in needed]
        groups += [group for group in unbound if group]
    return tuple(dict.fromkeys(groups))


def places_along(actions: Actions, id: str, other: str, places: np.ndarray) -> np.ndarray | None:
    """Where places along `id` stand along `other`, from which `id` is built; `None` if it is not.

    The place along a product is the place along each of its parts; along a concatenation or a stack, `other` has to be
    in every part that may be met.
    """
    action = actions[id]
    if id == other:
        return places
    if action.kind == "product":
        sizes = [actions[part].size for part in action.parts]
        for part, coordinate in zip(action.parts, _unravel(places, sizes), strict=True):
            found = places_along(actions, part, other, coordinate)
            if found is not None:
                return found
    if action.kind == "concat" and _count(actions, id, other):
        total = np.zeros_like(places)
        for part, inside, local in _pieces(actions, action, places):
            total = total + inside * places_along(actions, part, other, local)
        return total
    if action.kind == "stack":
        # Whoever asks moves with the same part at the same place, so that the other parts do not matter.
        return next(
            (found for part in action.parts if (found := places_along(actions, part, other, places)) is not None), None
        )
    return None


def old_places(actions: Actions, perms: Mapping[str, Any], id: str, places: np.ndarray, around: Lookup) -> Any:
    """The old places of what stands at new `places` along an axis: `new[places] = old[old_places]`.

    Args:
      actions: by id.
      perms: index arrays of independent permutations, `[*places along per, size]`; one left out moves nothing.
      id: the axis' action.
      places: int32 array of new places.
      around: from an id to the new places along it, broadcastable to `places`; asked for `dependencies`.
    """
    action = actions[id]
    if action.kind == "permutation":
        return perms[id][(*(around(d) for d in action.per), places)] if id in perms else places
    if action.kind == "product":
        sizes = [actions[part].size for part in action.parts]
        coordinates = _unravel(places, sizes)
        siblings = list(zip(action.parts, coordinates, strict=True))
        total: Any = np.zeros_like(places)
        for i, (part, coordinate) in enumerate(siblings):
            nearby = _lookup(actions, siblings[:i] + siblings[i + 1 :], around)
            total = total * actions[part].size + old_places(actions, perms, part, coordinate, nearby)
        return total
    if action.kind == "concat":
        total, start = np.zeros_like(places), 0
        for part, inside, local in _pieces(actions, action, places):
            total = total + inside * (start + old_places(actions, perms, part, local, around))
            start += actions[part].size
        return total
    if action.kind == "stack":
        here = around(action.per[0])
        moved = {part: old_places(actions, perms, part, places, around) for part in action.parts}
        return sum(np.int32(here == i) * moved[part] for i, part in enumerate(action.parts))
    return places


def index_array(actions: Actions, perms: Mapping[str, Any], id: str) -> Any:
    """Old places of a whole axis, `[*places along what it depends on, size]` (as `dependencies` lists it)."""
    groups = dependencies(actions, id)
    sizes = [actions[group[0]].size for group in groups]
    grid = np.meshgrid(*(np.arange(n, dtype=np.int32) for n in (*sizes, actions[id].size)), indexing="ij", sparse=True)

    def around(other: str) -> np.ndarray:
        return next(places for group, places in zip(groups, grid, strict=False) if other in group)

    moved = old_places(actions, perms, id, grid[-1], around)
    return moved + np.zeros((*sizes, actions[id].size), np.int32)


def neighbours(actions: Actions, ids: Sequence[str], places: Sequence[np.ndarray], axis: int) -> Lookup:
    """What `old_places` of one axis of a parameter asks: the places along ids that its other axes are built from."""
    pairs = list(zip(ids, places, strict=True))
    return _lookup(actions, pairs[:axis] + pairs[axis + 1 :], _unbound)


def check_neighbours(actions: Actions, ids: Sequence[str]) -> None:
    """Raises a ValueError where an axis depends on an id that stands on none, or on several, of the other axes."""
    for axis, id in enumerate(ids):
        for needed in itertools.chain(*dependencies(actions, id)):
            found = sum(_count(actions, other, needed) for j, other in enumerate(ids) if j != axis)
            if found != 1:
                raise ValueError(f"axis {axis} depends on {needed!r}, which stands on {found} of its other axes")


def orbits(actions: Actions, id: str) -> np.ndarray:
    """For each place along an axis, the number of the set of places it may move within, `[size]`, int32."""
    action = actions[id]
    if action.kind == "permutation" or (action.kind == "stack" and is_free(actions, id)):
        return np.zeros(action.size, np.int32)
    parts = [orbits(actions, part) for part in action.parts]
    counts = [int(part.max()) + 1 for part in parts]
    if action.kind == "product":
        coordinates = _unravel(np.arange(action.size, dtype=np.int32), [part.size for part in parts])
        moved = [part[coordinate] for part, coordinate in zip(parts, coordinates, strict=True)]
        return np.ravel_multi_index(moved, counts).astype(np.int32)
    if action.kind == "concat":
        starts = [0, *itertools.accumulate(counts)]
        return np.concatenate([start + part for start, part in zip(starts, parts, strict=False)]).astype(np.int32)
    return np.arange(action.size, dtype=np.int32)


def _count(actions: Actions, id: str, other: str) -> int:
    """How many times `other` stands at each place along `id`; 0 where it is missing at some places."""
    if id == other:
        return 1
    action = actions[id]
    counts = [_count(actions, part, other) for part in action.parts]
    if action.kind == "product":
        return sum(counts)
    if action.kind == "concat" and not all(counts):
        return 0
    return max(counts, default=0)


def _lookup(actions: Actions, pairs: Sequence[tuple[str, np.ndarray]], outside: Lookup) -> Lookup:
    """Finds places among the (id, places) pairs, and else `outside`."""

    def find(other: str) -> Any:
        for id, places in pairs:
            if _count(actions, id, other):
                return places_along(actions, id, other, places)
        return outside(other)

    return find


def _unbound(other: str) -> Any:
    raise ValueError(f"nothing tells the place along {other!r}")


def _unravel(places: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return [coordinate.astype(np.int32) for coordinate in np.unravel_index(places, sizes)]


def _pieces(actions: Actions, action: AxisAction, places: np.ndarray) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """For each part of a concatenation: its id, 1 where a place is inside it, and the place in it (0 elsewhere)."""
    start = 0
    for part in action.parts:
        size = actions[part].size
        inside = ((places >= start) & (places < start + size)).astype(np.int32)
        yield part, inside, (places - start) * inside
        start += size
