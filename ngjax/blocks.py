"""Parameters cut into blocks along whose axes one independent permutation each moves the places.

A concatenated axis is cut into its parts, a stacked one into its slices, and a product becomes an axis for each part.
What is left of the action language (`ngjax.actions`) is then simple enough for linear algebra: an axis of a block has a
letter, the permutation that moves it, and, where that is another one for each place along other axes, a table that says
which.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ngjax.actions import Actions, places_along


class BlockAxis(NamedTuple):
    """One axis of a block.

    Attributes:
      letter: id of the permutation that moves its places; `""` where nothing does.
      rows: number of the permutation that acts among those of the letter (row-major over the places along `per`), for
        each place along the block's other axes: as many axes as the block, of size 1 where it does not matter.
    """

    letter: str
    rows: np.ndarray

    @property
    def on(self) -> tuple[int, ...]:
        """The axes of the block that decide which permutation acts."""
        return tuple(axis for axis, n in enumerate(self.rows.shape) if n > 1)


class BlockLayout(NamedTuple):
    """Where a block is in its parameter: `parameter[places]` is the block, one array of places per axis of it."""

    axes: tuple[BlockAxis, ...]
    places: tuple[np.ndarray, ...]


def block_layouts(actions: Actions, ids: Sequence[str]) -> list[BlockLayout]:
    """The blocks that make up a parameter with these actions on its axes; each entry is in one of them.

    Raises:
      ValueError: a stack along an axis that moves. Its permutations are no group: they are written as a `permutation`
        with `per`.
    """
    along = sorted({stack for id in ids for stack in _stacked_along(actions, id)})
    for id in along:
        if any(actions[letter].kind == "permutation" for letter in _all_parts(actions, id)):
            raise ValueError(f"a stack along {id!r}, which moves itself; expected a permutation with per={id!r}")
    layouts = []
    for places in itertools.product(*(range(actions[id].size) for id in along)):
        at = dict(zip(along, places, strict=True))
        for words in itertools.product(*(_words(actions, id, at) for id in ids)):
            met = frozenset().union(*(word.met for word in words))
            if all(id in met or not place for id, place in at.items()):  # else it is the same block once more
                layouts.append(_layout(actions, ids, words))
    return layouts


def move(
    values: np.ndarray, axes: Sequence[BlockAxis], perms: Mapping[str, np.ndarray], order: Mapping[str, int]
) -> np.ndarray:
    """A block after permutations, `new[i] = old[perm[i]]` along each axis.

    Args:
      values: of the block, before.
      axes: of the block.
      perms: index arrays `[rows, size]` by letter; one left out moves nothing.
      order: of the letters, those that others depend on before them.
    """
    moved = [axis for axis, (letter, _) in enumerate(axes) if letter in perms]
    for axis in sorted(moved, key=lambda axis: order[axes[axis].letter]):
        letter, rows = axes[axis]
        if len(perms[letter]) == 1:
            values = np.take(values, perms[letter][0], axis)
        else:
            values = np.take_along_axis(values, spread_rows(perms[letter], rows, axis), axis)
    return values


def spread_rows(table: np.ndarray, rows: np.ndarray, axis: int) -> np.ndarray:
    """What a table `[rows, size]` of a letter says of each place of a block, in the block's order of axes.

    Args:
      table: of the letter on `axis`.
      rows: those of that `BlockAxis`.
      axis: of the block; the others have size 1 where they make no difference.
    """
    return np.moveaxis(table[np.squeeze(rows, axis)], -1, axis)


# -- words of the action language as plain axes -----------------------------------------------------------------------


class _Word(NamedTuple):
    """A part of an axis along which the same letters stand everywhere.

    Attributes:
      letters: one for each axis of `places`: its id, and for each id that it depends on the places along it (as many
        axes as `places`), `None` where they are not known here.
      places: along the whole axis.
      met: ids along which this is a single place, for the stacks along them.
    """

    letters: tuple[tuple[str, dict[str, np.ndarray | None]], ...]
    places: np.ndarray
    met: frozenset[str] = frozenset()


def _words(actions: Actions, id: str, at: Mapping[str, int]) -> Iterator[_Word]:
    action = actions[id]
    if id in at:
        yield _Word((), np.array(at[id], np.int32), frozenset([id]))
    elif action.kind == "product":
        sizes = [actions[part].size for part in action.parts]
        for words in itertools.product(*(_words(actions, part, at) for part in action.parts)):
            places: np.ndarray = np.zeros((), np.int32)
            for size, coordinate in zip(sizes, _side_by_side(words), strict=True):
                places = places * np.int32(size) + coordinate
            met = frozenset().union(*(word.met for word in words))
            yield _Word(_join(actions, action.parts, words), places, met)
    elif action.kind == "concat":
        starts = itertools.accumulate((actions[part].size for part in action.parts), initial=0)
        for part, start in zip(action.parts, starts, strict=False):
            for word in _words(actions, part, at):
                yield word._replace(places=word.places + np.int32(start))
    elif action.kind == "stack":
        yield from _words(actions, action.parts[at[action.per[0]]], at)
    else:
        letter = id if action.kind == "permutation" else ""
        yield _Word(((letter, dict.fromkeys(action.per)),), np.arange(action.size, dtype=np.int32))


def _join(
    actions: Actions, ids: Sequence[str], words: Sequence[_Word]
) -> tuple[tuple[str, dict[str, np.ndarray | None]], ...]:
    """The letters of words side by side, who now know the places along one another."""
    ndims = [word.places.ndim for word in words]

    def find(need: str, i: int) -> np.ndarray | None:
        for j, (id, other) in enumerate(zip(ids, words, strict=True)):
            found = None if j == i else places_along(actions, id, need, other.places)
            if found is not None:
                return _widened(found, j, ndims)
        return None

    return tuple(
        # What is known comes from nearer by, and counts.
        (letter, {need: find(need, i) if known is None else _widened(known, i, ndims) for need, known in needs.items()})
        for i, word in enumerate(words)
        for letter, needs in word.letters
    )


def _widened(array: np.ndarray, i: int, ndims: Sequence[int]) -> np.ndarray:
    """Axes of size 1 for those of the arrays before and after number `i`."""
    return array.reshape((1,) * sum(ndims[:i]) + array.shape + (1,) * sum(ndims[i + 1 :]))


def _side_by_side(words: Sequence[_Word]) -> list[np.ndarray]:
    """The places along each word, with axes for all of them."""
    ndims = [word.places.ndim for word in words]
    return [_widened(word.places, i, ndims) for i, word in enumerate(words)]


def _layout(actions: Actions, ids: Sequence[str], words: Sequence[_Word]) -> BlockLayout:
    places = tuple(_side_by_side(words))
    axes = []
    for letter, needs in _join(actions, ids, words):
        rows = np.zeros((1,) * sum(word.places.ndim for word in words), np.int32)
        for need, along in needs.items():
            if along is None:
                raise ValueError(f"nothing tells the place along {need!r}, on which {letter!r} depends")
            rows = rows * np.int32(actions[need].size) + along
        axes.append(BlockAxis(letter, _shrink(rows)))
    return BlockLayout(tuple(axes), places)


def _shrink(rows: np.ndarray) -> np.ndarray:
    """Size 1 along the axes that make no difference."""
    for axis in range(rows.ndim):
        first = rows.take([0], axis)
        if (rows == first).all():
            rows = first
    return rows


def _all_parts(actions: Actions, id: str) -> Iterator[str]:
    yield id
    for part in actions[id].parts:
        yield from _all_parts(actions, part)


def _stacked_along(actions: Actions, id: str) -> Iterator[str]:
    """The axes along which there are stacks in a word."""
    for part in _all_parts(actions, id):
        if actions[part].kind == "stack":
            yield actions[part].per[0]
