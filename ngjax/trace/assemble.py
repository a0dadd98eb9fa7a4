"""From what was seen in a program to a `NeuralGraphSpec`: actions, node groups, edge groups, and what was lost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngjax.actions import AxisAction, concat, fixed, is_free, orbits, permutation, product, stack
from ngjax.spec import (
    EdgeGroup,
    MoveError,
    NeuralGraphSpec,
    NodeGroup,
    NodeLayout,
    ParamSpec,
    ParamView,
    Role,
    format_path,
    param_view,
)
from ngjax.trace.axes import (
    Letter,
    Uniform,
    Word,
    at,
    collapse,
    find,
    is_pinned,
    is_uniform,
    letters_of,
    pin,
    places,
    resolve,
)
from ngjax.trace.neurons import Link, Neurons, restricted
from ngjax.trace.program import Contraction, Program
from ngjax.trace.rules import Words
from ngjax.trace.weights import Window, all_pieces, factorize

NO_PLACE = "no place in the graph"


@dataclasses.dataclass
class Piece:
    """Neurons that the program never tells apart: a node group of the spec."""

    name: str
    nodes: np.ndarray
    word: Word
    activation: str
    bias: ParamView | None = None
    level: int = 0


class Edges(NamedTuple):
    """An edge group between two pieces, by their numbers."""

    source: int
    target: int
    blocks: int
    view: ParamView | None
    constant: float
    source_layout: NodeLayout | None
    target_layout: NodeLayout | None


class Factor(NamedTuple):
    """A factor of a link's index space: its size, and how far it goes in the parameter and among the neurons."""

    size: int
    weight: int
    source: int
    target: int


def assemble(
    program: Program, params: Sequence[ParamSpec], words: Sequence[Words], outputs: Sequence[np.ndarray], treedef: Any
) -> NeuralGraphSpec:
    """The spec.

    Args:
      program: after it was run.
      params: the leaves, without axes; those that are not floating stay so.
      words: of the leaves' axes.
      outputs: numbers of the neurons that make up the results.
      treedef: of the parameters.
    """
    neurons = program.layers.neurons
    neurons.refine()
    pieces, piece_of, rank = _pieces(neurons)
    edges = [e for link in neurons.links for e in _edges(link, params, pieces, piece_of, rank)]
    edges = list(dict.fromkeys(edges))
    biases = [b for window, ids in neurons.biases for b in _biases(window, ids, params, pieces, piece_of, rank)]
    out = {int(piece_of[node]) for ids in outputs for node in np.unique(ids) if node >= 0}
    homeless: set[int] = set()
    while True:
        try:
            return _spec(
                program, params, words, [dataclasses.replace(p) for p in pieces], edges, biases, out, homeless, treedef
            )
        except MoveError as error:
            # The parameter depends on places that only some of its neurons have: it gets no place, and is pinned.
            homeless.add(error.param)


def _spec(
    program: Program,
    params: Sequence[ParamSpec],
    words: Sequence[Words],
    pieces: list[Piece],
    edges: Sequence[Edges],
    biases: Sequence[tuple[int, ParamView]],
    outputs: set[int],
    homeless: set[int],
    treedef: Any,
) -> NeuralGraphSpec:
    edges = [edge for edge in edges if edge.view is None or edge.view.param not in homeless]
    biases = [(piece, view) for piece, view in biases if view.param not in homeless]
    kept_edges, loose = _homes(params, words, pieces, edges, biases)
    for i in sorted(loose):
        for word in words[i]:
            pin(word, NO_PLACE)
    arrays = [*program.arrays, *words, *((piece.word,) for piece in pieces)]
    per = _dependencies(arrays, program.contractions)
    actions = _Actions(per, _letter_names(pieces, params, words))
    specs = tuple(
        param._replace(axes=tuple(actions.of(word, n) for word, n in zip(axes, param.shape, strict=True)))
        if param.is_floating
        else param
        for param, axes in zip(params, words, strict=True)
    )
    nodes, edge_groups = _groups(pieces, kept_edges, outputs, actions, params)
    return NeuralGraphSpec(
        specs,
        nodes,
        edge_groups,
        tuple(actions.made),
        loose=tuple(param_view(i, params[i].shape, target=range(len(params[i].shape))) for i in sorted(loose)),
        treedef=treedef,
    )


# -- nodes -------------------------------------------------------------------------------------------------------------


def _pieces(neurons: Neurons) -> tuple[list[Piece], np.ndarray, np.ndarray]:
    pieces: list[Piece] = []
    # One entry more than there are nodes, for -1.
    piece_of, rank = np.full(neurons.size + 1, -1), np.zeros(neurons.size + 1, np.int64)
    used: Counter[str] = Counter()
    for group in neurons.groups:
        parts = neurons.part[group.start : group.start + group.size]
        numbers = list(dict.fromkeys(parts.tolist()))
        for number in numbers:
            mask = parts == number
            nodes = group.start + np.flatnonzero(mask)
            piece_of[nodes], rank[nodes] = len(pieces), np.arange(len(nodes))
            name = group.name if not used[group.name] else f"{group.name}.{used[group.name]}"
            used[group.name] += 1
            activation = neurons.activation[int(nodes[0])]
            pieces.append(Piece(name, nodes, restricted(group.word, mask), activation))
    return pieces, piece_of, rank


def _groups(
    pieces: Sequence[Piece], edges: Sequence[tuple[Edges, bool]], outputs: set[int], actions: _Actions, params: Any
) -> tuple[tuple[NodeGroup, ...], tuple[EdgeGroup, ...]]:
    _levels(pieces, [(e.source, e.target) for e, mirror in edges if not mirror and e.source != e.target])
    outgoing, incoming = {e.source for e, _ in edges}, {e.target for e, _ in edges}
    ids = [actions.of(piece.word, len(piece.nodes)) for piece in pieces]
    made: list[tuple[int, int, int, NodeGroup]] = []
    for i, (piece, id) in enumerate(zip(pieces, ids, strict=True)):
        if i not in outgoing and i not in incoming and piece.bias is None:
            continue
        free = is_free(actions.by_id, id)
        role: Role = "hidden"
        if not free and i not in incoming and piece.bias is None:
            role = "input"
        elif not free and i in outputs and i not in outgoing:
            role = "output"
        level = 0 if role == "input" else max(1, piece.level)
        slots = 1 if free else int(orbits(actions.by_id, id).max()) + 1
        group = NodeGroup(piece.name, len(piece.nodes), role, level, id, piece.activation, slots=slots, bias=piece.bias)
        made.append((("input", "hidden", "output").index(role), level if role == "hidden" else 0, i, group))
    made.sort(key=lambda item: item[:3])
    names: Counter[str] = Counter()
    groups = []
    for edge, mirror in edges:
        source, target = pieces[edge.source].name, pieces[edge.target].name
        if edge.view is None:
            name = f"{source}->{target}"
        else:
            name = format_path(params[edge.view.param].path)
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}.{names[name] - 1}"
        layouts = edge.source_layout, edge.target_layout
        groups.append(EdgeGroup(unique, source, target, edge.blocks, edge.view, edge.constant, mirror, *layouts))
    return tuple(item[3] for item in made), tuple(groups)


def _levels(pieces: Sequence[Piece], edges: Sequence[tuple[int, int]]) -> None:
    targets: dict[int, list[int]] = {}
    waiting = Counter(target for _, target in edges)
    for source, target in edges:
        targets.setdefault(source, []).append(target)
    ready = [i for i in range(len(pieces)) if not waiting[i]]
    while ready:
        i = ready.pop()
        for target in targets.get(i, ()):
            pieces[target].level = max(pieces[target].level, pieces[i].level + 1)
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)


# -- edges -------------------------------------------------------------------------------------------------------------


def _edges(
    link: Link, params: Sequence[ParamSpec], pieces: Sequence[Piece], piece_of: np.ndarray, rank: np.ndarray
) -> Iterator[Edges]:
    """The edge groups of a link: one for each pair of pieces that it joins and whose edges can be said in factors."""
    source, target, window = link.source, link.target, link.window
    ends = [piece_of[source], piece_of[target]]
    positions = [rank[source], rank[target]]
    shape = [max(a, b) for a, b in zip(source.shape, target.shape, strict=True)]
    if window is not None:
        shape = [max(n, window.extent(axis)) for axis, n in enumerate(shape)]
    keys = [np.stack([_along(end, axis, n) for end in ends], axis=1) for axis, n in enumerate(shape)]
    for box in all_pieces(keys):
        factors: list[list[Factor]] | None = []
        parts = [_part(end, box) for end in ends]
        if any(part.min() != part.max() for part in parts):
            continue
        a, b = (int(part.flat[0]) for part in parts)
        if a < 0 or b < 0:
            continue
        here = [_part(position, box) for position in positions]
        offset = 0 if window is None else window.offset
        for axis, places_here in enumerate(box):
            flat = np.zeros(1, np.int64) if window is None else window.flat(axis)
            flat = flat[places_here] if len(flat) > 1 else np.zeros(len(places_here), np.int64)
            offset += int(flat[0])
            vectors = np.stack([flat - flat[0], *(_along(p, axis, len(places_here)) - int(p.flat[0]) for p in here)])
            found = factorize(vectors)
            if found is None:
                factors = None
                break
            assert factors is not None
            factors.append([Factor(size, *steps) for size, steps in found])
        if factors is None or not all(_is_sum(p, factors, i) for i, p in enumerate(here)):
            continue
        edges = _edge_group(link, params, factors, offset, (a, b), [len(pieces[i].nodes) for i in (a, b)])
        if edges is not None:
            yield edges


def _along(array: np.ndarray, axis: int, n: int) -> np.ndarray:
    """Values along one axis, at the first place along the others."""
    row = array[tuple(slice(None) if i == axis else 0 for i in range(array.ndim))]
    return np.broadcast_to(row, n)


def _part(array: np.ndarray, box: Sequence[np.ndarray]) -> np.ndarray:
    for axis, places_here in enumerate(box):
        if array.shape[axis] > 1:
            array = array.take(places_here, axis)
    return array


def _is_sum(array: np.ndarray, factors: Sequence[Sequence[Factor]], end: int) -> bool:
    """Whether the neurons' places are the sum of what the factors of each axis add."""
    if sum(n > 1 for n in array.shape) < 2:
        return True
    total: Any = int(array.flat[0])
    for axis, n in enumerate(array.shape):
        row = np.zeros(1, np.int64)
        if n > 1:
            for factor in factors[axis]:
                row = (row[:, None] + np.arange(factor.size) * factor[2 + end]).reshape(-1)
        total = total + row.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    return bool(np.array_equal(np.broadcast_to(total, array.shape), array))


def _edge_group(
    link: Link,
    params: Sequence[ParamSpec],
    factors: Sequence[Sequence[Factor]],
    offset: int,
    ends: tuple[int, int],
    sizes: Sequence[int],
) -> Edges | None:
    flat = [factor for axis in factors for factor in axis]
    if link.window is None:
        flat = [f for f in flat if f.source or f.target]
    elif any(not f.weight and (f.source or f.target) for f in flat):
        return None  # one weight on several edges
    else:
        flat = [f for f in flat if f.weight]
    if any(f.source < 0 or f.target < 0 or f.weight < 0 for f in flat):
        return None
    blocks = sorted((f for f in flat if f.source and f.target), key=lambda f: -f.target)
    source = sorted((f for f in flat if f.source and not f.target), key=lambda f: -f.source)
    target = sorted((f for f in flat if f.target and not f.source), key=lambda f: -f.target)
    kernel = [f for f in flat if not f.source and not f.target]
    if kernel and [f.size for f in kernel] == [n for n in link.taps if n > 1]:
        # A kernel of 3 x 1 is not one of 1 x 3.
        longer = iter(kernel)
        kernel = [next(longer) if n > 1 else Factor(1, 0, 0, 0) for n in link.taps]
    source_layout = _layout(blocks, source, [f.source for f in (*blocks, *source)], sizes[0])
    target_layout = _layout(blocks, target, [f.target for f in (*blocks, *target)], sizes[1])
    if source_layout is False or target_layout is False:
        return None
    view = None
    if link.window is not None:
        view = _view(link.window.param, params, offset, blocks, source, target, kernel)
        if view is None or len(view.kernel) > 3:
            return None
    count = math.prod(f.size for f in blocks)
    return Edges(*ends, count, view, link.constant, source_layout or None, target_layout or None)


def _layout(blocks: Sequence[Factor], rest: Sequence[Factor], steps: Sequence[int], size: int) -> Any:
    """How the neurons of a group are blocks: `None` if one after the other, `False` if they are not all there."""
    order = sorted(zip(steps, [f.size for f in (*blocks, *rest)], range(len(steps)), strict=True), reverse=True)
    expected = size
    for step, n, _ in order:
        if expected != step * n:
            return False
        expected = step
    if expected != 1:
        return False
    numbers = [i for _, _, i in order]
    if numbers == sorted(numbers):
        return None
    return NodeLayout(tuple(n for _, n, _ in order), tuple(numbers.index(i) for i in range(len(blocks))))


def _view(
    param: int,
    params: Sequence[ParamSpec],
    offset: int,
    blocks: Sequence[Factor],
    source: Sequence[Factor],
    target: Sequence[Factor],
    kernel: Sequence[Factor],
) -> ParamView | None:
    shape = params[param].shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axes: list[list[tuple[int, int, str, int]]] = [[] for _ in shape]  # size, step along the axis, role, order
    for role, factors in (("block", blocks), ("source", source), ("target", target), ("kernel", kernel)):
        for order, factor in enumerate(factors):
            if factor.size == 1:
                empty = next((i for i, n in enumerate(shape) if n == 1 and not axes[i]), 0)
                axes[empty].append((1, 1, role, order * 64))
                continue
            pieces = _by_axis(shape, strides, factor.size, factor.weight)
            if pieces is None:
                return None
            for sub, (axis, size, step) in enumerate(pieces):
                axes[axis].append((size, step, role, order * 64 + sub))
    starts = []
    for n, stride in zip(shape, strides, strict=True):
        starts.append(offset // stride % n if n else 0)
    numbers: dict[str, list[tuple[int, int]]] = {"block": [], "source": [], "target": [], "kernel": []}
    splits, steps_of, number = {}, {}, 0
    for axis, found in enumerate(axes):
        found.sort(key=lambda item: -item[1])
        if starts[axis] + sum((size - 1) * step for size, step, _, _ in found) >= max(shape[axis], 1):
            return None
        splits[axis] = tuple(size for size, _, _, _ in found) or (1,)
        steps_of[axis] = tuple(step for _, step, _, _ in found) or (1,)
        for _, _, role, order in found:
            numbers[role].append((order, number))
            number += 1
        number += not found
    roles = {role: tuple(i for _, i in sorted(items)) for role, items in numbers.items()}
    view = param_view(param, shape, starts=dict(enumerate(starts)), splits=splits, strides=steps_of, **roles)
    if all(view.is_slice(axis) for axis in range(len(shape))):
        view = view._replace(strides=())
    return view


def _by_axis(shape: Sequence[int], strides: Sequence[int], size: int, step: int) -> list[tuple[int, int, int]] | None:
    """A strided factor of the flat parameter as factors of its axes, outermost first: `(axis, size, step)`."""
    pieces = []
    for axis in reversed(range(len(shape))):
        if size == 1 or shape[axis] == 1:
            continue
        span = strides[axis] * shape[axis]
        if step >= span:
            continue
        if step % strides[axis]:
            return None
        inside = min(size, -(-span // step))
        if inside < size and (span % step or size % inside):
            return None
        pieces.append((axis, inside, step // strides[axis]))
        size //= inside
        step *= inside
    return pieces[::-1] if size == 1 else None


def _biases(
    window: Window,
    ids: np.ndarray,
    params: Sequence[ParamSpec],
    pieces: Sequence[Piece],
    piece_of: np.ndarray,
    rank: np.ndarray,
) -> Iterator[tuple[int, ParamView]]:
    keys = [_along(piece_of[ids], axis, n)[:, None] for axis, n in enumerate(ids.shape)]
    for box in all_pieces(keys):
        part = _part(piece_of[ids], box)
        if part.min() != part.max():
            continue
        piece = int(part.flat[0])
        here = _part(rank[ids], box)
        factors, offset = [], window.offset
        for axis, places_here in enumerate(box):
            flat = window.flat(axis)
            flat = flat[places_here] if len(flat) > 1 else np.zeros(len(places_here), np.int64)
            offset += int(flat[0])
            row = _along(here, axis, len(places_here)) - int(here.flat[0])
            found = factorize(np.stack([flat - flat[0], np.zeros_like(row), row]))
            if found is None:
                break
            factors.append([Factor(size, *steps) for size, steps in found])
        else:
            if not _is_sum(here, factors, 1):
                continue
            targets = sorted((f for axis in factors for f in axis), key=lambda f: -f.target)
            if any(not f.weight or not f.target for f in targets):
                continue
            if _layout([], targets, [f.target for f in targets], len(pieces[piece].nodes)) is False:
                continue
            view = _view(window.param, params, offset, [], [], targets, [])
            if view is not None:
                yield piece, view


# -- homes -------------------------------------------------------------------------------------------------------------


def _homes(
    params: Sequence[ParamSpec],
    words: Sequence[Words],
    pieces: list[Piece],
    edges: Sequence[Edges],
    biases: Sequence[tuple[int, ParamView]],
) -> tuple[list[tuple[Edges, bool]], set[int]]:
    """Gives every scalar one home: its first use. Returns the edges, later uses marked, and the loose parameters."""
    regions: dict[int, list[tuple[ParamView, list[np.ndarray]]]] = {}
    covered: Counter[int] = Counter()

    def claim(view: ParamView) -> bool:
        own = [np.unique(view.places(axis)) for axis in range(len(view.starts))]
        for _, other in regions.get(view.param, ()):
            if all(np.intersect1d(a, b, assume_unique=True).size for a, b in zip(own, other, strict=True)):
                return False
        regions.setdefault(view.param, []).append((view, own))
        covered[view.param] += math.prod(map(len, own))
        return True

    for piece, view in biases:
        if pieces[piece].bias is None and claim(view):
            pieces[piece].bias = view
    kept = [(edge, edge.view is not None and not claim(edge.view)) for edge in edges]
    for i, param in enumerate(params):
        if 0 < covered[i] < math.prod(param.shape):
            rest = _unread_rows(i, param, words[i], pieces, [edge for edge, mirror in kept if not mirror])
            if rest is not None and rest.view is not None and claim(rest.view):
                kept.append((rest, False))
    loose = {i for i, param in enumerate(params) if param.is_floating and covered[i] != math.prod(param.shape)}
    for own in pieces:
        if own.bias is not None and own.bias.param in loose:
            own.bias = None
    return [(e, mirror) for e, mirror in kept if e.view is None or e.view.param not in loose], loose


def _unread_rows(i: int, param: ParamSpec, words: Words, pieces: list[Piece], edges: Sequence[Edges]) -> Edges | None:
    """Edges for the rows of a table (positions beyond the length of the example) that the program does not read."""
    found = [edge for edge in edges if edge.view is not None and edge.view.param == i]
    if len(found) != 1 or found[0].view is None or found[0].blocks != 1 or found[0].view.strides:
        return None
    view = found[0].view
    short = [a for a, (start, size) in enumerate(zip(view.starts, view.sizes, strict=True)) if size < param.shape[a]]
    if len(short) != 1 or view.starts[short[0]] != 0 or len(view.splits[short[0]]) != 1:
        return None
    (axis,) = short
    if view.source != (sum(map(len, view.splits[:axis])),) or view.kernel:
        return None
    start = view.sizes[axis]
    rows = param.shape[axis] - start
    word = restricted(words[axis], np.arange(param.shape[axis]) >= start)
    pin(word, "not read")
    pieces.append(Piece(f"{pieces[found[0].source].name}.unread", np.arange(rows), word, "none"))
    rest = view._replace(
        starts=tuple(start if a == axis else n for a, n in enumerate(view.starts)),
        sizes=tuple(rows if a == axis else n for a, n in enumerate(view.sizes)),
        splits=tuple((rows,) if a == axis else n for a, n in enumerate(view.splits)),
    )
    return found[0]._replace(source=len(pieces) - 1, view=rest, source_layout=None)


# -- actions -----------------------------------------------------------------------------------------------------------


def _along_of(stacked: Letter) -> Letter:
    assert stacked.along is not None
    return stacked.along


def _stacks(word: Word) -> Iterator[Letter]:
    for factor in resolve(word):
        if isinstance(factor, Letter):
            if factor.slices is not None:
                yield factor
            for part in factor.parts or factor.slices or ():
                yield from _stacks(part)


def _dependencies(arrays: Sequence[Words], contractions: Sequence[Contraction]) -> dict[Letter, tuple[Letter, ...]]:
    """On the place along which other letters the permutation of a letter may depend.

    A letter may be shuffled in another way at each place along another one if no array has the one without the other,
    and no sum over it runs where the other differs between the factors.
    """

    def all_words() -> Iterator[Words]:
        seen: set[Words] = set()
        sums = (_summed(item) for item in contractions)
        for words in itertools.chain(arrays, sums):
            resolved = tuple(resolve(word) for word in words)
            if resolved not in seen:
                seen.add(resolved)
                yield resolved

    changed = True
    while changed:
        changed = False
        for words in all_words():
            for word in words:
                for root in _stacks(word):
                    here = sum((places(other) for other in words), Counter[Letter]())
                    if root.slices is not None and here[find(_along_of(root))] != 1:
                        collapse(root, "scan")
                        changed = True
    allowed: dict[Letter, set[Letter]] = {}
    for words in all_words():
        for slice_words in _each_place(words):
            for item, near in _contexts(slice_words):
                allowed[item] = allowed[item] & near if item in allowed else near
    per: dict[Letter, tuple[Letter, ...]] = {}
    for item in sorted(allowed, key=lambda x: x.number):
        chosen: list[Letter] = []
        for other in sorted((x for x in allowed[item] if x.is_plain), key=lambda x: x.number):
            # Of two letters that are always together, the later one depends on the earlier one.
            mutual = item in allowed.get(other, ())
            if (not mutual or other.number < item.number) and not _reaches(per, other, item):
                chosen.append(other)
        if chosen:
            per[item] = tuple(chosen)
    return per


def _reaches(per: dict[Letter, tuple[Letter, ...]], start: Letter, end: Letter) -> bool:
    return start is end or any(_reaches(per, item, end) for item in per.get(start, ()))


def _summed(item: Contraction) -> Words:
    half = len(item.summed) // 2
    pairs = zip(item.summed[:half], item.summed[half:], strict=True)
    return (*(b if is_uniform(a) else a for a, b in pairs), *item.batch)


def _each_place(words: Words) -> Iterable[Words]:
    for word in words:
        for root in _stacks(word):
            along = find(_along_of(root))
            for i in range(along.size):
                yield from _each_place(tuple(at(other, along, i) for other in words))
            return
    yield words


def _contexts(words: Words) -> Iterator[tuple[Letter, set[Letter]]]:
    counts = [places(word) for word in words]
    for i, word in enumerate(words):
        others: Counter[Letter] = Counter()
        for j, count in enumerate(counts):
            if j != i:
                others.update(count)
        yield from _inside(word, Counter(), others)


def _inside(word: Word, within: Counter[Letter], others: Counter[Letter]) -> Iterator[tuple[Letter, set[Letter]]]:
    """What is near each free letter: `within` its own axis, and on the others. An axis knows its own places first."""
    factors = resolve(word)
    for i, factor in enumerate(factors):
        if not isinstance(factor, Letter):
            continue
        own = within + places((*factors[:i], *factors[i + 1 :]))
        if factor.parts is not None:
            for part in factor.parts:
                yield from _inside(part, own, others)
        elif not factor.reason:
            near = {item for item, n in own.items() if n == 1}
            near |= {item for item, n in others.items() if n == 1 and not own[item]}
            yield factor, near - {factor}


def _letter_names(pieces: Sequence[Piece], params: Sequence[ParamSpec], words: Sequence[Words]) -> dict[Letter, str]:
    """Free letters are called after the neurons that they shuffle, else after the first parameter that has them."""
    names: dict[Letter, str] = {}
    for piece in pieces:
        found = list(dict.fromkeys(letters_of(piece.word)))
        for i, item in enumerate(found):
            names.setdefault(item, piece.name if len(found) == 1 else f"{piece.name}[{i}]")
    for param, axes in zip(params, words, strict=True):
        path = format_path(param.path)
        for axis, word in enumerate(axes):
            for item in letters_of(word):
                names.setdefault(item, f"{path}:{axis}")
    return names


class _Actions:
    """Actions for words, each made once, what they are built from before them."""

    def __init__(self, per: dict[Letter, tuple[Letter, ...]], names: dict[Letter, str]) -> None:
        self.per, self.names = per, names
        self.by_id: dict[str, AxisAction] = {}
        self.of_word: dict[Word, str] = {}

    @property
    def made(self) -> list[AxisAction]:
        return list(self.by_id.values())

    def of(self, word: Word, size: int) -> str:
        factors = resolve(word)
        if not factors or math.prod(f.size for f in factors) != size:
            return self.add(AxisAction(f"fixed_{size}", size, "fixed", reason="size one" if size == 1 else "no axis"))
        if factors not in self.of_word:
            self.of_word[factors] = self._make(factors, size)
        return self.of_word[factors]

    def add(self, action: AxisAction) -> str:
        self.by_id.setdefault(action.id, action)
        return action.id

    def unique(self, name: str) -> str:
        name = re.sub(r"\s+", "_", name) or "axis"
        return next(
            n for n in itertools.chain([name], (f"{name}#{i}" for i in itertools.count(1))) if n not in self.by_id
        )

    def _make(self, factors: Word, size: int) -> str:
        if len(factors) > 1:
            if is_pinned(factors):
                return self.add(fixed(self.unique(f"fixed_{size}"), size, _reason(factors)))
            parts = [self.by_id[self.of((factor,), factor.size)] for factor in factors]
            return self.add(product(self.unique("x".join(part.id for part in parts)[:60]), parts))
        (factor,) = factors
        if isinstance(factor, Uniform):
            return self.add(fixed(self.unique("constant"), size, "constant"))
        if is_pinned(factors):
            name = self.names.get(factor, f"fixed_{size}") if factor.is_plain else f"fixed_{size}"
            return self.add(fixed(self.unique(name), size, _reason(factors) or "taken apart into single places"))
        if factor.parts is not None:
            ids = [self.of(part, math.prod(f.size for f in part)) for part in factor.parts]
            parts = [self.by_id[id] for id in ids]
            return self.add(concat(self.unique("+".join(ids)[:60]), parts))
        if factor.slices is not None:
            base = find(_along_of(factor))
            along = self.by_id[self.of((base,), base.size)]
            ids = [self.of(part, size) for part in factor.slices]
            return self.add(stack(self.unique(f"stack({ids[0]})"[:60]), [self.by_id[id] for id in ids], per=along))
        per = [self.by_id[self.of((item,), item.size)] for item in self.per.get(factor, ())]
        return self.add(permutation(self.unique(self.names.get(factor, "free")), size, per=per))


def _reason(word: Word) -> str:
    reasons: list[str] = []
    for factor in resolve(word):
        if isinstance(factor, Letter):
            if factor.reason:
                reasons.append(factor.reason)
            reasons += [_reason(part) for part in factor.parts or factor.slices or ()]
    return ", ".join(dict.fromkeys(filter(None, reasons)))
