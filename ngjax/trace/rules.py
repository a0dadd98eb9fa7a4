"""What each primitive of jaxprs demands of the axes of its operands (`ngjax.trace.axes`), and how its results move.

A rule takes the equation and the words of its operands, one per axis, and returns those of its results. A rule is
sound if shuffling the operands as their words say shuffles the results as the returned words say. Primitives without a
rule pin all axes they touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ngjax.trace.axes import (
    Letter,
    Word,
    cut,
    is_pinned,
    is_stacked,
    is_uniform,
    join,
    letter,
    pin,
    resolve,
    size_of,
    slices_of,
    split_word,
    uniform,
    unify,
)

Words: TypeAlias = tuple[Word, ...]
Rule: TypeAlias = Callable[[Any, list[Words]], list[Words]]

# Of every entry by itself (and of the same entry of other operands).
_NAMES = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil "
    "clamp clz conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not "
    "one_minus_square or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round "
    "rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub "
    "tan tanh xor zeta random_gamma_grad optimization_barrier device_put sharding_constraint pvary mesh_cast "
)
ELEMENTWISE = frozenset(_NAMES.split())
# These have as many results as operands, each like its own.
SIDE_BY_SIDE = frozenset(("optimization_barrier", "device_put", "sharding_constraint", "pvary", "mesh_cast", "copy"))


# What is written replaces what was there, is added to it, subtracted or multiplied with it.
LINEAR_SCATTERS = ("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter-mul", "scatter_mul")
_ANY_ORDER = frozenset(("add", "mul", "max", "min", "and", "or", "xor"))
_MOST_PARTS = 16  # of an axis that is taken apart into places with neurons of their own


def elementwise(eqn: Any, operands: list[Words]) -> list[Words]:
    """Every entry from the same entry of the operands."""
    if eqn.primitive.name in SIDE_BY_SIDE:
        return list(operands)
    shape = eqn.outvars[0].aval.shape
    if len(operands[0]) > len(shape) or (len(operands) == 1 and len(operands[0]) < len(shape)):
        return unknown(eqn, operands)  # a cast to numbers of another width
    words = []
    for axis, n in enumerate(shape):
        word = uniform(n)
        for operand in operands:
            # Operands without the axis, and those of size one along it, are the same at all its places.
            if len(operand) == len(shape) and size_of(operand[axis]) == n:
                word = unify(word, operand[axis], eqn.primitive.name)
        words.append(word)
    return [tuple(words)] * len(eqn.outvars)


def unknown(eqn: Any, operands: list[Words]) -> list[Words]:
    """Nothing is known of the primitive: no axis that it touches may move."""
    name = eqn.primitive.name
    for operand in operands:
        for word in operand:
            pin(word, name)
    return [pinned(v.aval.shape, name) for v in eqn.outvars]


def pinned(shape: Sequence[int], reason: str) -> Words:
    """Words of an array none of whose axes moves."""
    return tuple(letter(n, reason) for n in shape)


def _fixed(word: Word, size: int, reason: str) -> Word:
    """Pins a word, and returns what is read off it, of another size."""
    if not is_uniform(word):
        pin(word, reason)
    return letter(size, reason)


def contraction(eqn: Any) -> tuple[Any, Any, Any, Any]:
    """Contracted axes of both operands of a dot_general, batch axes of both."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    return tuple(left), tuple(right), tuple(left_batch), tuple(right_batch)


def dot_general(eqn: Any, operands: list[Words]) -> list[Words]:
    """Contracted axes move together, and batch axes; the others stay as they are."""
    x, y = operands
    left, right, left_batch, right_batch = contraction(eqn)
    batch = [unify(x[i], y[j], "dot_general") for i, j in zip(left_batch, right_batch, strict=True)]
    for i, j in zip(left, right, strict=True):
        unify(x[i], y[j], "dot_general")
    rest = [w for i, w in enumerate(x) if i not in left + left_batch]
    rest += [w for i, w in enumerate(y) if i not in right + right_batch]
    return [(*batch, *rest)]


def convolution(eqn: Any, operands: list[Words]) -> list[Words]:
    """Features as in a product; a window looks at its places along space, which pins them."""
    x, kernel = operands
    numbers = eqn.params["dimension_numbers"]
    groups, batch_groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    if batch_groups != 1:
        return unknown(eqn, operands)
    (batch, features, *_), (out, into, *taps) = numbers.lhs_spec, numbers.rhs_spec
    name = eqn.primitive.name
    for axis in numbers.lhs_spec[2:]:
        pin(x[axis], name)
    for axis in taps:
        pin(kernel[axis], name)
    if groups == 1:
        unify(x[features], kernel[into], name)
    else:
        # Channels are groups x channels of a group, on both sides with the same groups.
        source, target = split_word(x[features], groups), split_word(kernel[out], groups)
        if source is None or target is None:
            return unknown(eqn, operands)
        unify(source[0], target[0], name)
        unify(kernel[into], source[1], name)
    shape = eqn.outvars[0].aval.shape
    words = list(pinned(shape, name))
    words[numbers.out_spec[0]] = x[batch]
    words[numbers.out_spec[1]] = kernel[out]
    return [tuple(words)]


def broadcast_in_dim(eqn: Any, operands: list[Words]) -> list[Words]:
    """What is repeated is constant along the new axis."""
    x = operands[0]
    shape = eqn.params["shape"]
    words = [uniform(n) for n in shape]
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[axis] == shape[place]:
            words[place] = x[axis]
    return [tuple(words)]


def reshape(eqn: Any, operands: list[Words]) -> list[Words]:
    """Rows of factors, taken apart where an axis is split."""
    x, shape = operands[0], eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return unknown(eqn, operands)
    return [reshaped(x, shape, eqn.primitive.name)]


def reshaped(x: Words, shape: Sequence[int], reason: str) -> Words:
    """The words of an array of another shape with the same entries in row-major order."""
    rest: Word = tuple(factor for word in x for factor in resolve(word))
    words: list[Word] = []
    for n in shape:
        halves = split_word(rest, n)
        if halves is None:
            for word in x:
                pin(word, reason)
            return pinned(shape, reason)
        word, rest = halves
        words.append(word)
    return tuple(words)


def transpose(eqn: Any, operands: list[Words]) -> list[Words]:
    """The same axes in another order."""
    return [tuple(operands[0][i] for i in eqn.params["permutation"])]


def squeeze(eqn: Any, operands: list[Words]) -> list[Words]:
    """Axes of size one left out."""
    return [tuple(w for i, w in enumerate(operands[0]) if i not in eqn.params["dimensions"])]


def reduction(eqn: Any, operands: list[Words]) -> list[Words]:
    """An axis that is summed over does not matter any more."""
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    together = operands[: len(eqn.outvars)]  # `reduce` takes several arrays, then their initial values
    words = []
    for axis in range(len(together[0])):
        word = together[0][axis]
        for operand in together[1:]:
            word = unify(word, operand[axis], eqn.primitive.name)
        if axis not in axes:
            words.append(word)
    return [tuple(words)] * len(eqn.outvars)


def general_reduction(eqn: Any, operands: list[Words]) -> list[Words]:
    """By a function of two numbers, which has to be one that does not depend on the order."""
    inner = eqn.params["jaxpr"]
    equations = getattr(inner, "jaxpr", inner).eqns
    if all(equation.primitive.name in _ANY_ORDER for equation in equations) and len(equations) == len(eqn.outvars):
        return reduction(eqn, operands)
    return unknown(eqn, operands)


def arg_reduction(eqn: Any, operands: list[Words]) -> list[Words]:
    """The place of the largest entry names a place."""
    for axis in eqn.params["axes"]:
        pin(operands[0][axis], eqn.primitive.name)
    return reduction(eqn, operands)


def along_an_axis(eqn: Any, operands: list[Words]) -> list[Words]:
    """Cumulative sums, sorting, reversing: the order of places along one axis (or some) matters."""
    params = eqn.params
    axes = params.get("dimensions", (params.get("axis", params.get("dimension")),))
    words = list(elementwise_words(eqn, operands))
    for axis in axes:
        words[axis] = _fixed(words[axis], size_of(words[axis]), eqn.primitive.name)
    return [tuple(words)] * len(eqn.outvars)


def elementwise_words(eqn: Any, operands: list[Words]) -> Words:
    """The words of operands of one shape that move together."""
    words = operands[0]
    for operand in operands[1:]:
        words = tuple(unify(a, b, eqn.primitive.name) for a, b in zip(words, operand, strict=True))
    return words


def top_k(eqn: Any, operands: list[Words]) -> list[Words]:
    """The order along one axis is lost."""
    words, axis = list(operands[0]), eqn.params.get("axis", -1) % len(operands[0])
    words[axis] = _fixed(words[axis], eqn.outvars[0].aval.shape[axis], eqn.primitive.name)
    return [tuple(words)] * len(eqn.outvars)


def fft(eqn: Any, operands: list[Words]) -> list[Words]:
    """The places along the transformed axes matter."""
    words, shape = list(operands[0]), eqn.outvars[0].aval.shape
    for axis in range(len(shape) - len(eqn.params["fft_lengths"]), len(shape)):
        words[axis] = _fixed(words[axis], shape[axis], eqn.primitive.name)
    return [tuple(words)]


def concatenate(eqn: Any, operands: list[Words]) -> list[Words]:
    """One after the other along one axis, together along the others."""
    axis = eqn.params["dimension"]
    words = []
    for i in range(len(operands[0])):
        if i == axis:
            words.append(_joined([operand[i] for operand in operands], eqn.primitive.name))
            continue
        word = operands[0][i]
        for operand in operands[1:]:
            word = unify(word, operand[i], eqn.primitive.name)
        words.append(word)
    return [tuple(words)]


def _joined(parts: Sequence[Word], reason: str) -> Word:
    """One after the other. What is pinned throughout is one letter: an image's rows need not be told apart."""
    parts = [part for part in parts if size_of(part)]
    if not parts:
        return letter(0, reason)
    if len(parts) > 1 and all(is_pinned(part) or is_uniform(part) for part in parts):
        return letter(sum(map(size_of, parts)), _reason_of(parts) or reason)
    return join(parts)


def _reason_of(parts: Sequence[Word]) -> str:
    return next((f.reason for part in parts for f in resolve(part) if isinstance(f, Letter) and f.reason), "")


def pad(eqn: Any, operands: list[Words]) -> list[Words]:
    """Constants before and after; a negative amount cuts."""
    words = []
    for word, n, (low, high, interior) in zip(
        operands[0], eqn.invars[0].aval.shape, eqn.params["padding_config"], strict=True
    ):
        name = eqn.primitive.name
        if (low, high) == (0, 0) and (interior == 0 or n <= 1):
            words.append(word)
        elif interior or n == 0:
            words.append(_fixed(word, max(0, low + high + n + max(0, n - 1) * interior), name))
        else:
            kept = _window(word, n, max(0, -low), n - max(0, -high), name)
            words.append(_joined([uniform(max(0, low)), kept, uniform(max(0, high))], name))
    return [tuple(words)]


def _window(word: Word, n: int, start: int, stop: int, reason: str) -> Word:
    """Places from `start` to `stop` of an axis of `n`."""
    if (start, stop) == (0, n):
        return word
    if stop <= start:
        return letter(0, reason)
    if is_uniform(word):
        return uniform(stop - start)
    if is_pinned(word):
        return letter(stop - start, _reason_of([word]))
    sizes = [size for size in (start, stop - start, n - stop) if size]
    return cut(word, sizes, reason)[1 if start else 0]


def slicing(eqn: Any, operands: list[Words]) -> list[Words]:
    """A window of each axis; steps over places pin it."""
    x, params = operands[0], eqn.params
    shape = eqn.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(shape)
    starts, stops = params["start_indices"], params["limit_indices"]
    for axis, n in enumerate(shape):
        if stops[axis] - starts[axis] == 1 < n <= _MOST_PARTS:
            x = _at_place(x, axis, starts[axis], eqn.primitive.name)
    words = []
    for word, n, start, stop, stride in zip(x, shape, starts, stops, strides, strict=True):
        if stride != 1 and not is_uniform(word):
            words.append(_fixed(word, -(-(stop - start) // stride), f"{eqn.primitive.name} with stride {stride}"))
        else:
            words.append(
                _window(word, n, start, stop, eqn.primitive.name)
                if stride == 1
                else uniform(-(-(stop - start) // stride))
            )
    return [tuple(words)]


def _at_place(x: Words, axis: int, place: int, reason: str) -> Words:
    """The words at one place of an axis whose places are taken apart (query, key and value of a fused projection).

    What the other axes hold may then move in another way at each place.
    """
    factors = resolve(x[axis])
    rest = [word for i, word in enumerate(x) if i != axis]
    if len(factors) != 1 or not isinstance(factors[0], Letter) or not factors[0].is_plain:
        return x
    along = factors[0]
    if all(is_pinned(word) or is_uniform(word) for word in rest):
        return x
    if along.reason and not any(is_stacked(word, along) for word in rest):
        return x
    along.reason = along.reason or reason
    return tuple(word if i == axis else slices_of(word, along)[place] for i, word in enumerate(x))


def splitting(eqn: Any, operands: list[Words]) -> list[Words]:
    """Several windows of one axis."""
    axis, sizes, x = eqn.params["axis"], eqn.params["sizes"], operands[0]
    n = sum(sizes)
    results, start = [], 0
    for size in sizes:
        piece = _window(x[axis], n, start, start + size, eqn.primitive.name)
        results.append((*x[:axis], piece, *x[axis + 1 :]))
        start += size
    return results


def dynamic_slice(eqn: Any, operands: list[Words]) -> list[Words]:
    """Axes that are taken whole stay; of others it is not known which places are taken."""
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    name = eqn.primitive.name
    return [tuple(w if k == n else _fixed(w, k, name) for w, n, k in zip(operands[0], shape, sizes, strict=True))]


def dynamic_update_slice(eqn: Any, operands: list[Words]) -> list[Words]:
    """Axes that are written whole move together."""
    x, update = operands[:2]
    name = eqn.primitive.name
    words = []
    for a, b, n, k in zip(x, update, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, strict=True):
        if n == k:
            words.append(unify(a, b, name))
        else:
            pin(b, name)
            words.append(_fixed(a, n, name))
    return [tuple(words)]


def gather(eqn: Any, operands: list[Words]) -> list[Words]:
    """Axes that are taken whole stay; those that indices point into are pinned."""
    x, indices = operands
    numbers, sizes, name = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.primitive.name
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    words: list[Word | None] = [None] * len(out_shape)
    kept = [i for i in range(len(shape)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    for axis, place in zip(kept, numbers.offset_dims, strict=True):
        whole = sizes[axis] == shape[axis]
        words[place] = x[axis] if whole else _fixed(x[axis], sizes[axis], name)
    for axis in numbers.collapsed_slice_dims:
        if shape[axis] != 1:
            pin(x[axis], name)
    for word in indices[-1:]:
        pin(word, name)
    batch = list(indices[:-1])
    for axis, other in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        batch[other] = unify(batch[other], x[axis], name)
    rest = iter(batch)
    return [tuple(next(rest) if word is None else word for word in words)]


def scatter(eqn: Any, operands: list[Words]) -> list[Words]:
    """Axes that are written whole move together, the updates as their indices do; places written to are pinned."""
    x, indices, updates = operands
    numbers, name = eqn.params["dimension_numbers"], eqn.primitive.name
    if numbers.operand_batching_dims:
        return unknown(eqn, operands)
    words = list(x)
    places = [i for i in range(len(x)) if i not in numbers.inserted_window_dims]
    for i, place in zip(numbers.update_window_dims, places, strict=True):
        if size_of(x[place]) == size_of(updates[i]):
            words[place] = unify(x[place], updates[i], name)
        else:
            pin(updates[i], name)
            words[place] = _fixed(x[place], size_of(x[place]), name)
    for axis in (*numbers.inserted_window_dims, *numbers.scatter_dims_to_operand_dims):
        words[axis] = _fixed(words[axis], size_of(words[axis]), name)
    batch = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for i, word in zip(batch, indices[:-1], strict=True):
        unify(updates[i], word, name)
        # Of several updates at one place the last one stays, unless they are combined.
        if name == "scatter" and not eqn.params["unique_indices"]:
            pin(word, name)
            pin(updates[i], name)
    pin(indices[-1], name)
    return [tuple(words)]


def reduce_window(eqn: Any, operands: list[Words]) -> list[Words]:
    """Axes with a window of one place stay."""
    params, name = eqn.params, eqn.primitive.name
    words = list(operands[0])
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    steps = params.get("window_strides") or (1,) * len(shape)
    for axis, window in enumerate(params["window_dimensions"]):
        padding = tuple(params["padding"][axis]) if "padding" in params else (0, 0)
        if window != 1 or steps[axis] != 1 or padding != (0, 0) or shape[axis] != out_shape[axis]:
            words[axis] = _fixed(words[axis], out_shape[axis], name)
    return [tuple(words)] * len(eqn.outvars)


def iota(eqn: Any, operands: list[Words]) -> list[Words]:
    """A number for each place names the place."""
    shape, axis = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    return [tuple(letter(n, "iota") if i == axis else uniform(n) for i, n in enumerate(shape))]


RULES: dict[str, Rule] = dict.fromkeys(ELEMENTWISE, elementwise)
RULES |= dict.fromkeys(
    ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"), reduction
)
RULES |= dict.fromkeys(("argmax", "argmin"), arg_reduction)
RULES |= dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev"), along_an_axis)
RULES |= dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"), reduce_window)
RULES |= {
    "reduce": general_reduction,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "concatenate": concatenate,
    "pad": pad,
    "slice": slicing,
    "split": splitting,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    **dict.fromkeys((*LINEAR_SCATTERS, "scatter-min", "scatter_min", "scatter-max", "scatter_max"), scatter),
    "top_k": top_k,
    "fft": fft,
    "iota": iota,
}
