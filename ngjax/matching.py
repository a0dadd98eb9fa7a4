"""The neurons of one network put into the order of another's, or into an order of their own.

`match_params` is the weight matching of Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836, section 3.2, algorithm
1) for every architecture that a spec describes; `sort_params` finds an order that does not depend on the one in which
the neurons are. Both return permutations for `permute_params`. They read values, in numpy and float64: not for `jit`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, PRNGKeyArray
from scipy.optimize import linear_sum_assignment

from ngjax.blocks import BlockAxis, BlockLayout, block_layouts, move, spread_rows
from ngjax.check import check_params
from ngjax.spec import NeuralGraphSpec, format_path

# How much larger a sum of products has to be to be better, relative to its scale: more than rounding can make it.
_ROUNDING = 1e-13


def match_params(
    spec: NeuralGraphSpec, params: Any, target: Any, *, key: PRNGKeyArray
) -> dict[str, Int32[np.ndarray, "..."]]:
    """Permutations with which `permute_params(spec, perms, params)` is as near to `target` as can be found.

    The distance is the sum of squared differences over all floating leaves, running statistics among them. To make it
    as small as possible is NP-hard. This is coordinate descent: one permutation after the other, in random order,
    becomes the best one for the others as they stand, a linear assignment, until none gets any better. The distance
    never increases on the way.

    * Start: the order that `params` are in, or, where it is nearer, one found from what is pinned inwards. There each
      permutation is chosen as if places along the axes not matched yet could be sorted, which nothing can beat. So a
      network that is a permutation of `target` finds it exactly, unless some of its neurons are alike.
    * A permutation on which others depend (heads, the inner dimension of each in an order of its own) is matched
      together with them: a pair of heads is worth what the best match of their insides is, found in the same way.
    * A permutation on two axes of one leaf (recurrent weights) makes the step quadratic. As in Git Re-Basin, one axis
      is matched with the other as it stands, and what is no improvement is not taken.

    Args:
      spec: of both networks.
      params: of the one whose neurons move; concrete arrays, without batch and feature axes.
      target: of the one to match, of the same architecture.
      key: decides the order. Other orders may end at other distances: try several and keep the nearest.

    Returns:
      The index array of every independent permutation, `[size]`, with the axes on which it depends in front
      (`[heads, inner]`).

    Raises:
      ValueError: parameters of another architecture, NaN or infinity, with the path of the leaf.
      TypeError: a leaf that is no concrete real array.
    """
    structure, layouts = _structure_of(spec)
    moving, fixed = (_read_blocks(spec, layouts, tree, name) for name, tree in (("params", params), ("target", target)))
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
    return _index_arrays(spec, _match(structure, fixed, moving, rng)[0])


def sort_params(spec: NeuralGraphSpec, params: Any) -> dict[str, Int32[np.ndarray, "..."]]:
    """Permutations that put a network into an order that does not depend on the one it is in.

    `permute_params(spec, sort_params(spec, p), p)` is the same, to the last bit, for `p` and for `p` with its neurons
    in any other order. Neurons are sorted by the sum of squares of all weights and biases that move with them, the
    smallest first. Where two of these are equal, all that can be told without an order decides: what the weights
    are and between which kinds of neurons they stand, refined in rounds as Weisfeiler and Leman's colours are.

    Neurons that are equal even then stay in the order they are in. That makes no difference if they are alike (twins,
    such as dead neurons whose weights are all zero). It does where they can be told apart only all at once, as in
    networks whose weights take few values: then the order found is one of several.

    Args:
      spec: of the architecture.
      params: concrete arrays, without batch and feature axes.

    Returns:
      Index arrays of all independent permutations, as `match_params` gives them.

    Raises:
      ValueError: parameters of another architecture, NaN or infinity, with the path of the leaf.
      TypeError: a leaf that is no concrete real array.
    """
    structure, layouts = _structure_of(spec)
    colors = _colors(structure, _read_blocks(spec, layouts, params, "params"))
    perms: Perms = {}
    for tag in structure.tags:  # those that others depend on come first
        rows = tag.axes[-1].rows
        around = {letter: perm for letter, perm in perms.items() if letter != tag.letter}
        here = move(spread_rows(colors[tag.letter], rows, -1), tag.axes, around, structure.ranks)
        order = np.argsort(here, axis=-1, kind="stable")
        perms.setdefault(tag.letter, structure.identity(tag.letter))[rows.ravel()] = order.reshape(-1, tag.shape[-1])
    return _index_arrays(spec, perms)


# -- two networks as blocks -------------------------------------------------------------------------------------------

Perms = dict[str, np.ndarray]  # index arrays [rows, size] by letter: one row for each place along what it depends on


class _Tag(NamedTuple):
    """All permutations of a letter as a block `[..., size]`, along whose other axes what it depends on moves."""

    letter: str
    axes: tuple[BlockAxis, ...]
    shape: tuple[int, ...]


class _Structure:
    """What can be said of a matching problem without the weights.

    Attributes:
      blocks: axes of each block.
      tags: of all letters, those that others depend on first.
      ranks: of the letters, in that order.
      sizes: `[rows, size]` of each letter's index array.
      occurrences: of each letter: blocks and axes on which it is.
      dependents: of each letter: those that have another permutation at each of its places.
      neighbours: of each letter: those that are with it in a block.
    """

    def __init__(self, blocks: Sequence[tuple[BlockAxis, ...]], tags: Sequence[_Tag], ranks: Mapping[str, int]) -> None:
        self.blocks = blocks
        self.tags = sorted(tags, key=lambda tag: ranks[tag.letter])
        self.ranks = ranks
        self.sizes: dict[str, tuple[int, int]] = {}
        self.dependents: dict[str, set[str]] = {tag.letter: set() for tag in self.tags}
        for tag in self.tags:
            rows, _ = self.sizes.get(tag.letter, (0, 0))
            self.sizes[tag.letter] = (max(rows, int(tag.axes[-1].rows.max()) + 1), tag.shape[-1])
            for letter, _ in tag.axes[:-1]:
                if letter:
                    self.dependents[letter].add(tag.letter)
        self.occurrences: dict[str, list[tuple[int, int]]] = {letter: [] for letter in self.sizes}
        self.neighbours: dict[str, set[str]] = {letter: set() for letter in self.sizes}
        for number, axes in enumerate(blocks):
            letters = [axis.letter for axis in axes]
            for axis, letter in enumerate(letters):
                if letter:
                    self.occurrences[letter].append((number, axis))
                    self.neighbours[letter] |= set(letters) - {letter, ""}

    def identity(self, letter: str) -> np.ndarray:
        rows, size = self.sizes[letter]
        return np.tile(np.arange(size), (rows, 1))

    def is_linear(self, letter: str) -> bool:
        """Whether a step along this letter is a linear assignment: it is on no block twice."""
        numbers = [number for number, _ in self.occurrences[letter]]
        return len(numbers) == len(set(numbers))

    def insides(self, number: int, axis: int) -> list[int]:
        """The axes of a block along which there is another permutation at each place along `axis`."""
        axes = self.blocks[number]
        return [g for g, (letter, rows) in enumerate(axes) if letter and rows.shape[axis] > 1]


def _structure_of(spec: NeuralGraphSpec) -> tuple[_Structure, list[list[BlockLayout]]]:
    """The structure, and for each parameter of the spec its blocks in which something moves."""
    actions = spec.action
    free = [action for action in spec.actions if action.kind == "permutation" and action.size > 1]
    moving = {action.id for action in free}

    def layouts_of(ids: Sequence[str]) -> list[BlockLayout]:
        return [
            layout._replace(axes=tuple(a if a.letter in moving else a._replace(letter="") for a in layout.axes))
            for layout in block_layouts(actions, ids)
        ]

    layouts = [
        [layout for layout in layouts_of(param.axes) if any(axis.letter for axis in layout.axes)]
        for param in spec.params
    ]
    tags = [
        _Tag(action.id, layout.axes, np.broadcast_shapes(*(places.shape for places in layout.places)))
        for action in free
        for layout in layouts_of((*action.per, action.id))
    ]
    ranks = {action.id: i for i, action in enumerate(spec.actions)}
    return _Structure([layout.axes for blocks in layouts for layout in blocks], tags, ranks), layouts


def _read_blocks(
    spec: NeuralGraphSpec, layouts: Sequence[Sequence[BlockLayout]], params: Any, name: str
) -> list[np.ndarray]:
    """The blocks of all parameters, float64."""
    check_params(params, source=name)
    try:
        leaves = spec.flatten(params)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    blocks = []
    for param, leaf, of_param in zip(spec.params, leaves, layouts, strict=True):
        if not param.is_floating:
            continue
        where = f"{name}: parameter {format_path(param.path)}"
        if tuple(leaf.shape) != param.shape:
            raise ValueError(
                f"{where}: expected shape {param.shape}, without batch and feature axes, received {tuple(leaf.shape)}"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{where}: expected a floating array, received {leaf.dtype}")
        if of_param:
            values = np.asarray(leaf).astype(np.float64)
            blocks += [values[layout.places] for layout in of_param]
    return blocks


def _index_arrays(spec: NeuralGraphSpec, perms: Perms) -> dict[str, np.ndarray]:
    """An index array of the full shape for every independent permutation; those of size 1 included."""
    arrays = {}
    for action in spec.actions:
        if action.kind == "permutation":
            shape = (*(spec.action[id].size for id in action.per), action.size)
            array = perms[action.id] if action.id in perms else np.zeros(shape, np.int32)
            arrays[action.id] = array.reshape(shape).astype(np.int32)
    return arrays


# -- matching ---------------------------------------------------------------------------------------------------------


def _match(
    structure: _Structure, targets: Sequence[np.ndarray], values: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[Perms, float]:
    """The permutations of all letters that bring blocks near to their targets, and the sum of products they reach."""
    letters = list(structure.sizes)
    if len(letters) == 1 and structure.is_linear(letters[0]):
        benefits = _benefits(structure, targets, values, letters[0])
        perm = _assign(benefits)
        return {letters[0]: perm}, float(np.take_along_axis(benefits, perm[..., None], -1).sum())
    given = _State.at(structure, targets, values)
    found = _from_pinned_inwards(given)
    return _descend(found if found.better_than(given) else given, rng)


class _State(NamedTuple):
    """Where a matching stands: the blocks and tags as moved so far.

    Attributes:
      structure: of the problem.
      targets: blocks that stay.
      values: blocks that move.
      tags: for each tag of the structure the places where its neurons came from.
      products: `sum(target * values)` of each block.
      least_gain: the least by which their sum has to grow to be larger, more than rounding can make it.
    """

    structure: _Structure
    targets: Sequence[np.ndarray]
    values: Sequence[np.ndarray]
    tags: Sequence[np.ndarray]
    products: Sequence[float]
    least_gain: float

    @classmethod
    def at(cls, structure: _Structure, targets: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> _State:
        tags = [np.broadcast_to(np.arange(tag.shape[-1]), tag.shape) for tag in structure.tags]
        products = [float(np.vdot(target, value)) for target, value in zip(targets, values, strict=True)]
        scale = sum(float(np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(targets, values, strict=True))
        return cls(structure, targets, values, tags, products, _ROUNDING * scale)

    def moved(self, perms: Perms) -> _State:
        structure = self.structure
        perms = {letter: perm for letter, perm in perms.items() if (perm != structure.identity(letter)).any()}
        values, products = list(self.values), list(self.products)
        for number in {number for letter in perms for number, _ in structure.occurrences[letter]}:
            values[number] = move(values[number], structure.blocks[number], perms, structure.ranks)
            products[number] = float(np.vdot(self.targets[number], values[number]))
        tags = [move(x, tag.axes, perms, structure.ranks) for x, tag in zip(self.tags, structure.tags, strict=True)]
        return self._replace(values=values, tags=tags, products=products)

    def better_than(self, other: _State) -> bool:
        # Blocks that did not move cancel exactly.
        return sum(a - b for a, b in zip(self.products, other.products, strict=True)) > self.least_gain

    def perms(self) -> Perms:
        perms = {letter: self.structure.identity(letter) for letter in self.structure.sizes}
        for tag, places in zip(self.structure.tags, self.tags, strict=True):
            perms[tag.letter][tag.axes[-1].rows.ravel()] = places.reshape(-1, tag.shape[-1])
        return perms


def _from_pinned_inwards(state: _State) -> _State:
    """Each letter once, those first whose blocks have the largest share of axes that are matched already."""
    structure = state.structure
    unknown = set(structure.sizes)
    while unknown:
        held_back = set().union(*(structure.dependents[letter] for letter in unknown))
        shares = {
            letter: _known_share(structure, state.targets, letter, unknown)
            for letter in structure.sizes
            if letter in unknown and letter not in held_back
        }
        letter = max(shares, key=shares.__getitem__)
        benefits = _benefits(structure, state.targets, state.values, letter, unknown)
        state = state.moved({letter: _assign(benefits)})
        unknown.remove(letter)
    return state


def _known_share(structure: _Structure, targets: Sequence[np.ndarray], letter: str, unknown: set[str]) -> float:
    """Of all weights that move with a letter, the share of those whose other axes are known."""
    known, total = 0, 0
    for number, axis in structure.occurrences[letter]:
        others = [other.letter for g, other in enumerate(structure.blocks[number]) if g != axis]
        known += targets[number].size * unknown.isdisjoint(others)
        total += targets[number].size
    return known / max(total, 1)


def _descend(state: _State, rng: np.random.Generator) -> tuple[Perms, float]:
    """Steps along all letters in random order until none is an improvement."""
    structure = state.structure
    open_letters = list(structure.sizes)
    while open_letters:
        again: set[str] = set()
        for letter in rng.permutation(sorted(open_letters, key=structure.ranks.__getitem__)).tolist():
            again.discard(letter)
            perms = _step(state, letter, rng)
            after = state.moved(perms)
            if after.better_than(state):
                state = after
                again |= set().union(*(structure.neighbours[moved] for moved in perms))
                if not structure.is_linear(letter):
                    again.add(letter)
        open_letters = list(again)
    return state.perms(), sum(state.products, 0.0)


def _step(state: _State, letter: str, rng: np.random.Generator) -> Perms:
    """The best permutations of a letter, and of those that depend on it, while all others stay."""
    structure = state.structure
    benefits = _benefits(structure, state.targets, state.values, letter)
    inside = _match_insides(state, letter, rng)
    for (row, new, old), (_, product) in inside.items():
        benefits[row, new, old] += product
    perms = {letter: _assign(benefits)}
    for (row, new, old), (found, _) in inside.items():
        if perms[letter][row, new] == old:
            for dependent, (rows, perm) in found.items():
                perms.setdefault(dependent, structure.identity(dependent))[rows] = perm
    return perms


def _benefits(
    structure: _Structure,
    targets: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    letter: str,
    unknown: Collection[str] = (),
) -> np.ndarray:
    """Sums of products `[rows, new place, old place]`, of blocks in which nothing else depends on the letter.

    Along axes whose letter is unknown they are the largest that any order can have: of sorted numbers. Then all blocks
    count.
    """
    rows, size = structure.sizes[letter]
    benefits = np.zeros((rows, size, size))
    for number, axis in structure.occurrences[letter]:
        if structure.insides(number, axis) and not unknown:
            continue
        axes = structure.blocks[number]
        hidden = [g for g, other in enumerate(axes) if g != axis and other.letter in unknown]
        target, value = (_as_rows(x, axes, axis, hidden) for x in (targets[number], values[number]))
        benefits[axes[axis].rows.ravel()] += target @ value.swapaxes(1, 2)
    return benefits


def _as_rows(x: np.ndarray, axes: Sequence[BlockAxis], axis: int, hidden: Sequence[int]) -> np.ndarray:
    """A block as `[permutations, places, others]`; numbers along the axes `hidden` are sorted together."""
    on = axes[axis].on
    others = [g for g in range(x.ndim) if g != axis and g not in on and g not in hidden]
    lead = int(np.prod([x.shape[g] for g in on]))
    if not hidden:
        return x.transpose(*on, axis, *others).reshape(lead, x.shape[axis], -1)
    width = int(np.prod([x.shape[g] for g in hidden]))
    rows = x.transpose(*on, axis, *others, *hidden).reshape(lead, x.shape[axis], -1, width)
    return np.sort(rows, axis=-1).reshape(lead, x.shape[axis], -1)


def _assign(benefits: np.ndarray) -> np.ndarray:
    """For each new place the old one, `[rows, size]`, with the largest sum."""
    return np.stack([linear_sum_assignment(row, maximize=True)[1] for row in benefits])


# -- permutations within others ---------------------------------------------------------------------------------------

Inside = dict[str, tuple[np.ndarray, np.ndarray]]  # by letter: numbers of its permutations, and these


def _match_insides(
    state: _State, letter: str, rng: np.random.Generator
) -> dict[tuple[int, int, int], tuple[Inside, float]]:
    """For each permutation of a letter, new place and old place: the best match of what depends on the letter there."""
    structure = state.structure
    rows, size = structure.sizes[letter]
    found = {}
    for row in range(rows) if structure.dependents[letter] else ():
        sections = [
            (number, axis, index)
            for number, axis in structure.occurrences[letter]
            if structure.insides(number, axis)
            for index in _sections(structure.blocks[number], axis, row)
        ]
        if not sections:
            continue
        old_values = [[_cut(state.values[i], axis, index, old) for i, axis, index in sections] for old in range(size)]
        for new in range(size):
            part, numbers = _inside_structure(structure, letter, row, new, sections)
            targets = [_cut(state.targets[i], axis, index, new) for i, axis, index in sections]
            for old in range(size):
                perms, product = _match(part, targets, old_values[old], rng)
                found[row, new, old] = ({id: (numbers[id], perm) for id, perm in perms.items()}, product)
    return found


Index = tuple[Any, ...]


def _sections(axes: Sequence[BlockAxis], axis: int, row: int) -> list[Index]:
    """The part of a block (or none) that is moved by permutation number `row` of the letter on an axis."""
    on = axes[axis].on
    found = np.argwhere(axes[axis].rows == row)
    return [tuple(int(at[g]) if g in on else slice(None) for g in range(len(axes))) for at in found]


def _cut(x: np.ndarray, axis: int, index: Index, place: int) -> np.ndarray:
    return x[(*index[:axis], place, *index[axis + 1 :])]


def _inside_structure(
    structure: _Structure, letter: str, row: int, place: int, sections: Sequence[tuple[int, int, Index]]
) -> tuple[_Structure, dict[str, np.ndarray]]:
    """The structure at one place along a letter, and which of each letter's permutations are in it.

    Nothing moves there but what depends on this place: not the axes that depend on another axis with the same letter.
    """
    tags = []
    for tag in structure.tags:
        for axis, of_tag in enumerate(tag.axes[:-1]):
            for index in _sections(tag.axes, axis, row) if of_tag.letter == letter else ():
                axes = _axes_at(tag.axes, axis, index, place)
                shape = tuple(n for n, at in zip(tag.shape, _at(index, axis, place), strict=True) if at == slice(None))
                tags.append(_Tag(tag.letter, axes, shape))
    numbers = {
        id: np.unique(np.concatenate([tag.axes[-1].rows.ravel() for tag in tags if tag.letter == id]))
        for id in {tag.letter for tag in tags}
    }

    def renumbered(axes: Sequence[BlockAxis]) -> tuple[BlockAxis, ...]:
        return tuple(
            BlockAxis(id, np.searchsorted(numbers[id], rows)) if id in numbers else BlockAxis("", 0 * rows)
            for id, rows in axes
        )

    blocks = [renumbered(_axes_at(structure.blocks[i], axis, index, place)) for i, axis, index in sections]
    tags = [tag._replace(axes=renumbered(tag.axes)) for tag in tags]
    return _Structure(blocks, tags, structure.ranks), numbers


def _at(index: Index, axis: int, place: int) -> Index:
    return (*index[:axis], place, *index[axis + 1 :])


def _axes_at(axes: Sequence[BlockAxis], axis: int, index: Index, place: int) -> tuple[BlockAxis, ...]:
    """The axes that are left at a place; of the letters those are that depend on the axis cut through."""
    at = _at(index, axis, place)
    left = []
    for g, (letter, rows) in enumerate(axes):
        if at[g] == slice(None):
            here = rows[tuple(n if isinstance(n, slice) or rows.shape[i] > 1 else 0 for i, n in enumerate(at))]
            left.append(BlockAxis(letter if rows.shape[axis] > 1 else "", here))
    return tuple(left)


# -- sorting ----------------------------------------------------------------------------------------------------------


def _colors(structure: _Structure, blocks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Ranks of neurons by what can be told of them without an order, `[rows, size]` by letter."""
    colors = {letter: _ranked(sums) for letter, sums in _square_sums(structure, blocks).items()}
    while any(len(np.unique(row)) < len(row) for array in colors.values() for row in array):
        refined = {letter: _refined(structure, blocks, colors, letter) for letter in colors}
        if all(refined[letter].max() == colors[letter].max() for letter in colors):
            break
        colors = refined
    return colors


def _square_sums(structure: _Structure, blocks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    sums = {letter: np.zeros(sizes) for letter, sizes in structure.sizes.items()}
    for letter, occurrences in structure.occurrences.items():
        for number, axis in occurrences:
            axes = structure.blocks[number]
            rows = _as_rows(blocks[number] ** 2, axes, axis, ())
            sums[letter][axes[axis].rows.ravel()] += np.sort(rows, axis=-1).sum(axis=-1)  # sorted: rounded alike
    return sums


def _refined(
    structure: _Structure, blocks: Sequence[np.ndarray], colors: Mapping[str, np.ndarray], letter: str
) -> np.ndarray:
    """Colors of a letter, told apart further by the weights and the colors of the neurons at their other ends."""
    signatures = [colors[letter]]
    for number, axis in structure.occurrences[letter]:
        axes = structure.blocks[number]
        kinds = _ranked(blocks[number])
        for g, (other, rows) in enumerate(axes):
            if g != axis:
                places = np.arange(kinds.shape[g]).reshape(-1, *(1,) * (kinds.ndim - g - 1))
                ends = spread_rows(colors[other], rows, g) if other else places
                kinds = _ranked(kinds * (ends.max() + 1) + ends)
        rows = np.sort(_as_rows(kinds, axes, axis, ()), axis=-1)
        signature = np.full(structure.sizes[letter], -1)
        signature[axes[axis].rows.ravel()] = _ranked_rows(rows)
        signatures.append(signature)
    return _ranked_rows(np.stack(signatures, axis=-1))


def _ranked(x: np.ndarray) -> np.ndarray:
    """The number of each value among the different ones, in order."""
    return np.unique(x, return_inverse=True)[1].reshape(x.shape)


def _ranked_rows(x: np.ndarray) -> np.ndarray:
    """The same for rows, the last axis, in lexicographic order."""
    return np.unique(x.reshape(-1, x.shape[-1]), axis=0, return_inverse=True)[1].reshape(x.shape[:-1])
