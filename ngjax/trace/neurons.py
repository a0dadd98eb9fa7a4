"""The neurons of a traced program: which group of nodes each array's entries belong to, and what connects them.

While the program is followed, `Neurons` collects node groups (each with the word of its axis), links between nodes
(with the parameter window that holds their weights, or a constant) and biases. Nodes are numbered through all groups.
What later parts of the program tell apart (the three parts of a fused projection) splits the groups again.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ngjax.trace.axes import Letter, Uniform, Word, at, is_stacked, join, letter, pin, resolve, size_of
from ngjax.trace.weights import Window


@dataclasses.dataclass
class Group:
    """Nodes `start, ..., start + size - 1`; `word` says how they move."""

    name: str
    start: int
    size: int
    word: Word


@dataclasses.dataclass
class Link:
    """Edges: for each place of an index space, from node `source` to node `target`, with the weight in `window`.

    `source`, `target` and the window's axes broadcast to one shape; -1 is no node. `taps` are the lengths of a kernel,
    those of one included.
    """

    source: np.ndarray
    target: np.ndarray
    window: Window | None = None
    constant: float = 1.0
    taps: tuple[int, ...] = ()


class Snapshot(NamedTuple):
    """How much there was of what is only added to, and what changes as it was."""

    groups: int
    links: int
    biases: int
    open: np.ndarray
    biased: np.ndarray
    part: np.ndarray


@dataclasses.dataclass
class Neurons:
    """What was found so far. Per node: whether its group is still `open` to biases and sums, and its activation."""

    groups: list[Group] = dataclasses.field(default_factory=list)
    links: list[Link] = dataclasses.field(default_factory=list)
    biases: list[tuple[Window, np.ndarray]] = dataclasses.field(default_factory=list)
    open: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    biased: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    activation: list[str] = dataclasses.field(default_factory=list)
    part: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    num_parts: int = 0
    starts: list[int] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.part)

    def new(
        self, words: Sequence[Word], shape: Sequence[int], axes: Sequence[int], name: str, *, is_input: bool = False
    ) -> np.ndarray:
        """A new group with one node for each place along some axes of an array; their numbers, as an array's."""
        word = tuple(factor for axis in axes for factor in resolve(words[axis]))
        # What an array repeats moves with nothing, so that nothing is lost by pinning it.
        word = tuple(f if not isinstance(f, Uniform) else letter(f.size, "constant")[0] for f in word)
        size = math.prod(shape[axis] for axis in axes)
        if not word:
            word = letter(size, "size one")
        start = self.size
        self.groups.append(Group(name, start, size, word))
        self.open = np.concatenate([self.open, np.full(size, not is_input)])
        self.biased = np.concatenate([self.biased, np.zeros(size, bool)])
        self.activation += ["none"] * size
        self.part = np.concatenate([self.part, np.full(size, self.num_parts)])
        self.num_parts += 1
        self.starts.append(start)
        ids = np.arange(start, start + size)
        return ids.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])

    def link(
        self,
        source: np.ndarray,
        target: np.ndarray,
        window: Window | None = None,
        constant: float = 1.0,
        taps: tuple[int, ...] = (),
    ) -> None:
        self.links.append(Link(source, target, window, constant, taps))
        self.tell_apart(source)
        self.tell_apart(target)
        self.open[source[source >= 0]] = False

    def tell_apart(self, ids: np.ndarray) -> None:
        """The nodes in `ids` are in other parts than all other nodes of their groups."""
        found = np.unique(ids[ids >= 0])
        while found.size:
            group = self.groups[bisect.bisect_right(self.starts, int(found[0])) - 1]
            stop = group.start + group.size
            here, found = found[found < stop], found[found >= stop]
            if len(here) == group.size:
                continue
            parts = self.part[group.start : stop]
            for number in np.unique(self.part[here]):
                of_part = here[self.part[here] == number]
                if len(of_part) != np.count_nonzero(parts == number):
                    self.part[of_part] = self.num_parts
                    self.num_parts += 1

    def refine(self) -> None:
        """Tells apart what one-to-one links join to parts that were told apart."""
        pairs = [
            (link.source.reshape(-1), link.target.reshape(-1))
            for link in self.links
            if link.source.shape == link.target.shape and link.source.size > 1
        ]
        count = -1
        while count != self.num_parts:
            count = self.num_parts
            for source, target in pairs:
                for here, there in ((source, target), (target, source)):
                    parts = np.where(here >= 0, self.part[here], -1)
                    if np.all(parts == parts[0]):
                        continue
                    for number in np.unique(parts):
                        self.tell_apart(there[parts == number])

    def is_open(self, ids: np.ndarray) -> bool:
        return bool(np.all(ids >= 0) and np.all(self.open[ids]))

    def activate(self, ids: np.ndarray, name: str) -> None:
        nodes = ids[ids >= 0]
        self.tell_apart(nodes)
        for node in nodes.reshape(-1).tolist():
            self.activation[node] = name
        self.open[nodes] = False

    def add_bias(self, window: Window, ids: np.ndarray) -> None:
        self.tell_apart(ids)
        self.biases.append((window, ids))
        self.biased[ids] = True

    def snapshot(self) -> Snapshot:
        lengths = len(self.groups), len(self.links), len(self.biases)
        return Snapshot(*lengths, self.open.copy(), self.biased.copy(), self.part.copy())

    def restore(self, saved: Snapshot) -> None:
        """Forgets what was added since."""
        del self.groups[saved.groups :], self.starts[saved.groups :]
        del self.links[saved.links :], self.biases[saved.biases :], self.activation[len(saved.part) :]
        self.open, self.biased, self.part = saved.open, saved.biased, saved.part


def restricted(word: Word, mask: np.ndarray) -> Word:
    """The word of the places in `mask` alone; a pinned one where they do not come apart."""
    if mask.all():
        return word
    factors = resolve(word)
    count = int(mask.sum())
    if not factors or isinstance(factors[0], Uniform):
        return letter(count, "part of an axis")
    if len(factors) == 1:
        (root,) = factors
        assert not isinstance(root, Uniform)
        if root.parts is None:
            pin(factors, "part of an axis")
            return letter(count, root.reason or "part of an axis")

        kept, start = [], 0
        for part in root.parts:
            inside = mask[start : start + size_of(part)]
            start += size_of(part)
            if inside.any():
                kept.append(restricted(part, inside))
        return join(kept)
    rows = mask.reshape(factors[0].size, -1)
    some = np.any(rows, axis=1)
    row = rows[some][0]
    if not np.array_equal(rows[some], np.broadcast_to(row, rows[some].shape)):
        pin(factors, "part of an axis")
        return letter(count, "part of an axis")
    outer, inner = factors[0], factors[1:]
    if isinstance(outer, Letter) and is_stacked(inner, outer):
        if some.sum() > 1:
            pin(inner, "part of an axis")
        inner = at(inner, outer, int(np.argmax(some)))
    return (*restricted((outer,), np.asarray(some)), *restricted(inner, row))
