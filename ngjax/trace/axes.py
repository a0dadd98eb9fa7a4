"""Which axes of a program's arrays move together: words of letters, kept consistent by union-find.

Every axis of every array is a *word*: a row-major product of factors. A factor is a `Letter` (places that may be
shuffled, as far as anything seen so far says) or `Uniform` (the array is the same at every place, so that any shuffling
leaves it unchanged). What an equation of the program demands of its operands is said with four operations:

* `unify`: two axes are shuffled in the same way;
* `split`: a letter is the product of two (a reshape), which only keeps the shuffles that move whole rows;
* `cut`: a letter is several in a row (a slice, a concatenation), each shuffled by itself;
* `pin`: nothing may be shuffled, and why.

Each of them only ever shrinks the group of shuffles, so the order of the equations does not matter and one pass is
enough. Where a demand cannot be expressed, the axes are pinned: sound, and reported.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias


class Uniform(NamedTuple):
    """A factor along which an array is constant."""

    size: int


class Letter:
    """Places that are shuffled together: a node of a union-find forest.

    A root is plain, or cut into `parts` (one word after the other), or stacked (`slices`: one word for each place along
    the letter `along`). A letter split into a product has `factors`, by which every word replaces it.
    """

    __slots__ = ("along", "factors", "number", "parent", "parts", "reason", "size", "slices")
    count = itertools.count()

    def __init__(self, size: int, reason: str = "") -> None:
        self.size = size
        self.reason = reason
        self.number = next(Letter.count)  # for an order that does not depend on memory addresses
        self.parent: Letter | None = None
        self.factors: tuple[Factor, ...] | None = None
        self.parts: tuple[Word, ...] | None = None
        self.slices: tuple[Word, ...] | None = None
        self.along: Letter | None = None

    @property
    def is_plain(self) -> bool:
        return self.parts is None and self.slices is None


Factor: TypeAlias = Letter | Uniform
Word: TypeAlias = tuple[Factor, ...]


def letter(size: int, reason: str = "") -> Word:
    """A word of one new letter; pinned where a reason is given."""
    return (Letter(size, reason),)


def uniform(size: int) -> Word:
    """A word along which an array is constant."""
    return (Uniform(size),)


def size_of(word: Word) -> int:
    """Places along a word."""
    return math.prod(factor.size for factor in word)


def find(item: Letter) -> Letter:
    """The root of a letter, which stands for all that it was unified with."""
    root = item
    while root.parent is not None:
        root = root.parent
    while item.parent is not None:
        item.parent, item = root, item.parent
    return root


def resolve(word: Word) -> Word:
    """The word with split letters replaced by their factors, merged letters by their root, factors of one dropped."""
    if all(isinstance(f, Letter) and f.parent is None and f.factors is None and f.size > 1 for f in word):
        return word
    out: list[Factor] = []
    for factor in word:
        if isinstance(factor, Letter):
            factor = find(factor)
            if factor.factors is not None:
                out += resolve(factor.factors)
                continue
        if factor.size > 1:
            out.append(factor)
    return tuple(out)


def is_uniform(word: Word) -> bool:
    """Whether an array is constant along the word."""
    return all(isinstance(factor, Uniform) for factor in resolve(word))


def is_pinned(word: Word) -> bool:
    """Whether nothing along the word is free."""
    for factor in resolve(word):
        if isinstance(factor, Uniform):
            return False
        inner = factor.parts or factor.slices
        if inner is None and not factor.reason:
            return False
        if inner is not None and not all(map(is_pinned, inner)):
            return False
    return True


def pin(word: Word, reason: str) -> None:
    """Nothing along the word may move."""
    for factor in resolve(word):
        if not isinstance(factor, Letter):
            continue
        inner = factor.parts or factor.slices
        if inner is None:
            factor.reason = factor.reason or reason
        else:
            for part in inner:
                pin(part, reason)


def with_letters(word: Word) -> Word:
    """The word with new letters where it was uniform: for arrays that only start out constant."""
    return tuple(Letter(f.size) if isinstance(f, Uniform) else f for f in resolve(word))


def unify(a: Word, b: Word, reason: str) -> Word:
    """Makes two words move in the same way, and returns how; pins both for `reason` where that cannot be said."""
    if a is b:
        return a
    left, right = list(resolve(a)), list(resolve(b))
    if left == right:
        return tuple(left)
    out: list[Factor] = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size == y.size:
            out.append(_unify_factors(x, y, reason))
            continue
        longer, rest = (x, left) if x.size > y.size else (y, right)
        shorter = min(x.size, y.size)
        halves = split(longer, shorter) if longer.size % shorter == 0 else None
        if halves is None:
            for word in (out, [x], left, [y], right):
                pin(tuple(word), reason)
            return resolve(a)
        # Splitting may have replaced other factors as well, so both sides are read again.
        outer, inner = halves
        rest[:0] = resolve(inner)
        left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))
        first = resolve(outer)
        if longer is x:
            left[:0], right[:0] = first, resolve((y,))
        else:
            left[:0], right[:0] = resolve((x,)), first
    return resolve(tuple(out))


def _unify_factors(x: Factor, y: Factor, reason: str) -> Factor:
    if isinstance(x, Uniform):
        return y
    if isinstance(y, Uniform):
        return x
    x, y = find(x), find(y)
    if x is y:
        return x
    if y.is_plain and not x.is_plain:
        x, y = y, x
    if x.is_plain:
        if _occurs(x, (y,)):
            pin((y,), reason)
            return y
        if y.is_plain:
            if y.number > x.number:
                x, y = y, x
            y.reason = y.reason or x.reason
        elif x.reason:
            pin((y,), x.reason)
        else:
            _fill(y)
        x.parent = y
        return y
    if x.slices is not None and y.slices is not None and _same_stack(x, y):
        merged = tuple(unify(a, b, reason) for a, b in zip(x.slices, y.slices, strict=True))
        x.parent, y.slices = y, merged
        return y
    if x.parts is not None and y.parts is not None:
        bounds = sorted({*_bounds(x.parts), *_bounds(y.parts)})
        sizes = [b - a for a, b in itertools.pairwise([0, *bounds])]
        ours, theirs = cut((x,), sizes, reason), cut((y,), sizes, reason)
        x, y = find(x), find(y)
        if x is y or x.parts is None or y.parts is None:
            pin((x,), reason)
            pin((y,), reason)
            return y
        x.parent = y
        y.parts = tuple(unify(a, b, reason) for a, b in zip(ours, theirs, strict=True))
        return y
    pin((x,), reason)
    pin((y,), reason)
    return y


def _same_stack(x: Letter, y: Letter) -> bool:
    return x.along is not None and y.along is not None and find(x.along) is find(y.along)


def _fill(root: Letter) -> None:
    """New letters for what is uniform inside a letter that another one is about to follow."""
    if root.parts is not None:
        root.parts = tuple(with_letters(part) for part in root.parts)
    if root.slices is not None:
        root.slices = tuple(with_letters(part) for part in root.slices)
    for part in root.parts or root.slices or ():
        for factor in resolve(part):
            if isinstance(factor, Letter):
                _fill(factor)


def _occurs(x: Letter, word: Word) -> bool:
    return any(
        isinstance(f, Letter) and (f is x or any(_occurs(x, part) for part in f.parts or f.slices or ()))
        for f in resolve(word)
    )


def _bounds(parts: Iterable[Word]) -> list[int]:
    return list(itertools.accumulate(map(size_of, parts)))


def split(factor: Factor, outer: int) -> tuple[Word, Word] | None:
    """A factor as the product of two, the outer of size `outer`; `None` where its parts do not allow it."""
    inner = factor.size // outer
    if isinstance(factor, Uniform):
        return uniform(outer), uniform(inner)
    root = find(factor)
    if root.factors is not None:
        raise AssertionError("resolve the word first")
    if root.is_plain:
        pair = letter(outer, root.reason), letter(inner, root.reason)
        if not root.reason:  # pieces of a pinned letter need not know one another
            root.factors = (*pair[0], *pair[1])
        return pair
    if root.slices is not None:
        halves = [split_word(part, outer) for part in root.slices]
        if any(half is None for half in halves):
            return None
        made = []
        for i in range(2):
            stacked = Letter((outer, inner)[i])
            stacked.slices, stacked.along = tuple(half[i] for half in halves if half is not None), root.along
            made.append(stacked)
        root.factors = tuple(made)
        return (made[0],), (made[1],)
    assert root.parts is not None
    # Rows of a concatenation: each part is whole rows, and all rows move alike inside.
    if any(size_of(part) % inner for part in root.parts):
        return None
    rows, row = [], uniform(inner)
    for part in root.parts:
        halves_of_part = split_word(part, size_of(part) // inner)
        if halves_of_part is None:
            return None
        rows.append(halves_of_part[0])
        row = unify(row, halves_of_part[1], "rows of a reshaped concatenation")
    whole = join(rows)
    root.factors = (*whole, *row)
    return whole, row


def split_word(word: Word, outer: int) -> tuple[Word, Word] | None:
    """A word as the product of two, the outer of size `outer`; `None` where its factors do not allow it."""
    left: list[Factor] = []
    right = list(resolve(word))
    while outer > 1:
        if not right:
            return None
        factor = right.pop(0)
        if outer % factor.size == 0:
            left.append(factor)
            outer //= factor.size
            continue
        halves = split(factor, outer) if factor.size % outer == 0 else None
        if halves is None:
            return None
        left += halves[0]
        right[:0] = halves[1]
        outer = 1
    return tuple(left), tuple(right)


def join(parts: Sequence[Word]) -> Word:
    """The words one after the other."""
    words = [word for word in map(_alive, parts) if word is not None]
    if len(words) == 1:
        return words[0]
    flat: list[Word] = []
    for word in words:
        only = resolve(word)
        if len(only) == 1 and isinstance(only[0], Letter) and only[0].parts is not None:
            flat += only[0].parts
        else:
            flat.append(word)
    made = Letter(sum(map(size_of, flat)))
    made.parts = tuple(flat)
    return (made,)


def _alive(word: Word) -> Word | None:
    """The word, with its factors of size one kept where that is all there is; `None` for an empty one."""
    if size_of(word) == 0:
        return None
    return resolve(word) or (word[:1] if word else (Letter(1, "size one"),))


def cut(word: Word, sizes: Sequence[int], reason: str) -> list[Word]:
    """The word as pieces of the given sizes, one after the other; pinned pieces where it does not come apart there."""
    if len(sizes) == 1:
        return [word]
    factors = resolve(word)
    if is_uniform(factors):
        return [uniform(n) for n in sizes]
    if len(factors) > 1:
        inner = math.prod(f.size for f in factors[1:])
        if all(n % inner == 0 for n in sizes):
            outer = cut(factors[:1], [n // inner for n in sizes], reason)
            return [(*piece, *factors[1:]) for piece in outer]
        pin(factors, reason)
        return [letter(n, reason) for n in sizes]
    (root,) = factors
    assert isinstance(root, Letter)
    if root.slices is not None:
        pieces_of = [cut(part, sizes, reason) for part in root.slices]
        made = []
        for i, n in enumerate(sizes):
            piece = Letter(n)
            piece.slices, piece.along = tuple(pieces[i] for pieces in pieces_of), root.along
            made.append((piece,))
        root.slices, root.along = None, None
        root.parts = tuple(made)
        return list(root.parts)
    if root.parts is None:
        pieces = [letter(n, root.reason) for n in sizes]
        if not root.reason:
            root.parts = tuple(pieces)
        return pieces
    # Cut the parts at the new bounds, then gather the parts of each piece.
    bounds = set(itertools.accumulate(sizes))
    finer: list[Word] = []
    start = 0
    for part in root.parts:
        stop = start + size_of(part)
        inside = sorted(b for b in bounds if start < b < stop)
        finer += cut(part, [b - a for a, b in itertools.pairwise([start, *inside, stop])], reason)
        start = stop
    root.parts = tuple(finer)
    pieces, left = [], iter(finer)
    for n in sizes:
        taken: list[Word] = []
        while sum(map(size_of, taken)) < n:
            taken.append(next(left))
        pieces.append(join(taken))
    return pieces


def slices_of(word: Word, along: Letter) -> list[Word]:
    """The word at each place of a loop over `along`, where each place may have its own letters."""
    columns: list[list[Word]] = []
    for factor in resolve(word):
        n = along.size
        if isinstance(factor, Uniform):
            columns.append([(factor,)] * n)
            continue
        root = factor
        if root.slices is not None and root.along is not None and find(root.along) is find(along):
            columns.append(list(root.slices))
        elif root.parts is not None:
            parts = [slices_of(part, along) for part in root.parts]
            columns.append([join([part[i] for part in parts]) for i in range(n)])
        elif root.is_plain and not root.reason and root is not find(along):
            root.slices, root.along = tuple(letter(root.size) for _ in range(n)), along
            columns.append(list(root.slices))
        else:
            columns.append([(root,)] * n)
    return [tuple(itertools.chain.from_iterable(column[i] for column in columns)) for i in range(along.size)]


def is_stacked(word: Word, along: Letter) -> bool:
    """Whether a factor of the word moves in its own way at each place of `along`."""
    return any(
        isinstance(f, Letter) and f.slices is not None and f.along is not None and find(f.along) is find(along)
        for f in resolve(word)
    )


def at(word: Word, along: Letter, i: int) -> Word:
    """The word at place i of `along`."""
    out: list[Factor] = []
    for factor in resolve(word):
        if isinstance(factor, Letter) and factor.slices is not None and is_stacked((factor,), along):
            out += at(factor.slices[i], along, i)
        else:
            out.append(factor)
    return tuple(out)


def collapse(root: Letter, reason: str) -> None:
    """Makes all slices of a stacked letter move alike: something reads it without knowing the place in the stack."""
    assert root.slices is not None
    first, *others = root.slices
    merged = first
    for other in others:
        merged = unify(merged, other, reason)
    root.slices, root.along = None, None
    root.factors = merged


def letters_of(word: Word) -> Iterator[Letter]:
    """The plain letters that the word is made of."""
    for factor in resolve(word):
        if isinstance(factor, Letter):
            if factor.is_plain:
                yield factor
            for part in factor.parts or factor.slices or ():
                yield from letters_of(part)


def places(word: Word) -> Counter[Letter]:
    """How many times each letter stands at every place along the word (inside a concatenation: in all parts)."""
    total: Counter[Letter] = Counter()
    for factor in resolve(word):
        if not isinstance(factor, Letter):
            continue
        total[factor] += 1
        if factor.parts is not None:
            counts = [places(part) for part in factor.parts]
            common = set(counts[0]).intersection(*counts[1:])
            total.update({item: max(c[item] for c in counts) for item in common})
    return total
