"""Follows a jaxpr, its calls, loops and branches included: how the axes of every array move, and what they hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from ngjax.trace import rules, scalars
from ngjax.trace.axes import Letter, find, letter, letters_of, size_of, slices_of, uniform, unify, with_letters
from ngjax.trace.layers import Acts, Flow, Layers, Value, Weights
from ngjax.trace.rewrites import as_jaxpr, rewritten
from ngjax.trace.rules import Words
from ngjax.trace.weights import axes_of, sliced, squeezed

# Primitives whose results hold each place of an operand by itself, or not at all.
_MOVES = frozenset(("slice", "split", "reshape", "transpose", "squeeze", "broadcast_in_dim", "concatenate"))
_MOST_INDICES = 64  # in an index vector whose entries are followed


class Equation(NamedTuple):
    """An equation of a jaxpr whose numbers are Python's."""

    primitive: Any
    params: dict[str, Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]


class Contraction(NamedTuple):
    """Axes summed over together, and those that both factors of the sum are read at."""

    summed: Words
    batch: Words


@dataclasses.dataclass
class Program:
    """What was seen on the way."""

    layers: Layers
    arrays: list[Words] = dataclasses.field(default_factory=list)
    contractions: list[Contraction] = dataclasses.field(default_factory=list)

    def run(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
        """The results of a jaxpr for these operands."""
        env: dict[Any, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = _constant(const)
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, jex.Literal):
                return _constant(atom.val)
            return env[atom]

        for eqn in live_equations(jaxpr)[0]:
            plain = Equation(eqn.primitive, _plain_params(eqn.params), eqn.invars, eqn.outvars)
            results = self.equation(plain, [read(atom) for atom in eqn.invars])
            for var, value in zip(eqn.outvars, results, strict=True):
                env[var] = value
                if value.words:
                    self.arrays.append(value.words)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "while":
            return self.while_loop(eqn, operands)
        if name == "cond":
            return self.cond(eqn, operands)
        inner = _called(eqn)
        if inner is not None:
            return self.run(*inner, operands)
        simpler = rewritten(eqn, operands)
        if simpler is not None:
            function, taken = simpler
            jaxpr = as_jaxpr(function, [eqn.invars[i].aval for i in taken])
            return self.run(*_opened(jaxpr), [operands[i] for i in taken])
        rule = rules.RULES.get(name, rules.unknown)
        words = rule(eqn, [value.words for value in operands])
        self.record_mixing(eqn, operands, words)
        if not words:  # an effect (printing), which the rule has pinned
            return []
        if all(value.flow is None for value in operands):
            return [Value(w, None, _number(eqn, operands)) for w in words]
        return [Value(w, f) for w, f in zip(words, self.layers.flows(eqn, operands, words), strict=True)]

    def record_mixing(self, eqn: Any, operands: list[Value], words: Sequence[Words]) -> None:
        """What a sum reads together, and what is left of an operand without the axes whose places are mixed.

        The latter because an axis of the result may move as a mixed one does and still be another axis: what depends on
        the place along the one does not depend on the place along the other.
        """
        name = eqn.primitive.name
        if name in rules.ELEMENTWISE or name in _MOVES:
            return
        if name == "dot_general":
            x, y = (value.words for value in operands)
            left, right, left_batch, _ = rules.contraction(eqn)
            summed = (*(x[i] for i in left), *(y[i] for i in right))
            self.contractions.append(Contraction(summed, tuple(x[i] for i in left_batch)))
            rest = [tuple(w for i, w in enumerate(words) if i not in axes) for words, axes in ((x, left), (y, right))]
        elif name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            rest = [(operands[0].words[numbers.lhs_spec[0]],), (operands[1].words[numbers.rhs_spec[0]],)]
        elif name == "gather":
            numbers = eqn.params["dimension_numbers"]
            rest = [tuple(w for i, w in enumerate(operands[0].words) if i not in numbers.collapsed_slice_dims)]
        else:
            kept = {item for result in words for word in result for item in letters_of(word)}
            rest = [tuple(word for word in value.words if kept.intersection(letters_of(word))) for value in operands]
        self.arrays += [words for words in rest if words]

    # -- control flow -------------------------------------------------------------------------------------------------

    def cond(self, eqn: Any, operands: list[Value]) -> list[Value]:
        _, *operands = operands
        branches = [self.run(*_opened(b), operands) for b in eqn.params["branches"]]
        results = []
        for values in zip(*branches, strict=True):
            words = values[0].words
            for value in values[1:]:
                words = tuple(unify(a, b, "cond") for a, b in zip(words, value.words, strict=True))
            # Constant in each branch along an axis is constant; which branch is taken does not depend on the place.
            # Branches for different machines compute the same function: one of them may tell which.
            acts = sorted((v.flow for v in values if isinstance(v.flow, Acts)), key=lambda flow: flow.values is None)
            results.append(Value(words, acts[0] if acts else values[0].flow))
        return results

    def while_loop(self, eqn: Any, operands: list[Value]) -> list[Value]:
        params = eqn.params
        n, m = params["cond_nconsts"], params["body_nconsts"]
        test, body, carry = operands[:n], operands[n : n + m], operands[n + m :]

        def step(carry: list[Value]) -> list[Value]:
            self.run(*_opened(params["cond_jaxpr"]), [*test, *carry])
            return self.run(*_opened(params["body_jaxpr"]), [*body, *carry])

        return self.repeat(step, carry, len(carry), eqn.primitive.name)[0]

    def scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        params = eqn.params
        (n, m), length = _scan_counts(params), params["length"]
        consts, carry, stacked = operands[:n], operands[n : n + m], operands[n + m :]
        along = Letter(length, "scan")
        for value in stacked:
            unify(value.words[0], (along,), "scan")
        along = find(along)
        if length > 1 and any(isinstance(value.flow, Weights) for value in stacked):
            return self.unrolled(eqn, consts, carry, stacked, along)
        first = [Value(value.words[1:], _at(value.flow, 0)) for value in stacked]

        def step(carry: list[Value]) -> list[Value]:
            return self.run(*_opened(params["jaxpr"]), [*consts, *carry, *first])

        carried, rest = self.repeat(step, carry, m, "scan")
        return carried + [Value(((along,), *v.words), _with_axis(v.flow)) for v in rest]

    def repeat(
        self, step: Callable[[list[Value]], list[Value]], carry: list[Value], m: int, reason: str
    ) -> tuple[list[Value], list[Value]]:
        """A loop whose every round has the same weights: what is carried moves in the same way before and after."""
        words = [tuple(with_letters(word) for word in value.words) for value in carry]
        self.arrays += [w for w in words if w]

        def with_flows(flows: Sequence[Flow]) -> list[Value]:
            return [Value(w, f) for w, f in zip(words, flows, strict=True)]

        start = [value.flow if isinstance(value.flow, Acts) else Acts() for value in carry]
        # Once to see where neurons are in what is carried, then with a group for them.
        neurons = self.layers.neurons
        saved = neurons.snapshot()
        results = step(with_flows(start))
        for word, value in zip(words, results[:m], strict=True):
            for a, b in zip(word, value.words, strict=True):
                unify(a, b, reason)
        unlabelled = [
            i
            for i, (flow, value) in enumerate(zip(start, results, strict=False))
            if not flow.labels and isinstance(value.flow, Acts) and value.flow.labels
        ]
        if unlabelled:
            shapes = [tuple(size_of(w) for w in word) for word in words]
            neurons.restore(saved)
            for i in unlabelled:
                flow = results[i].flow
                assert isinstance(flow, Acts)
                labels = tuple(
                    neurons.new(words[i], shapes[i], axes_of(ids), "state") for ids in flow.labels if ids.size > 1
                )
                start[i] = Acts(labels)
            results = step(with_flows(start))
        return [Value(w, v.flow) for w, v in zip(words, results, strict=False)], results[m:]

    def unrolled(
        self, eqn: Any, consts: list[Value], carry: list[Value], stacked: list[Value], along: Letter
    ) -> list[Value]:
        """A loop over slices of parameters: each round has neurons of its own."""
        inner, m = _opened(eqn.params["jaxpr"]), len(carry)
        slices: list[list[Value]] = []
        for value in stacked:
            columns = [slices_of(word, along) for word in value.words[1:]]
            slices.append([Value(tuple(c[i] for c in columns), _at(value.flow, i)) for i in range(along.size)])
        order = range(along.size)
        rounds: dict[int, list[Value]] = {}
        for i in reversed(order) if eqn.params["reverse"] else order:
            self.arrays += [each[i].words for each in slices if each[i].words]
            results = self.run(*inner, [*consts, *carry, *(each[i] for each in slices)])
            # A constant at the start (zeros) need not stay one.
            carry, rounds[i] = results[:m], results[m:]
        out = []
        for values in zip(*(rounds[i] for i in order), strict=True):
            words = values[0].words
            for value in values[1:]:
                words = tuple(unify(a, b, "scan") for a, b in zip(words, value.words, strict=True))
            out.append(Value(((along,), *words), Acts() if isinstance(values[0].flow, Acts) else None))
        return carry + out


def live_equations(jaxpr: Any) -> tuple[list[Any], set[int]]:
    """The equations whose results are used, or that have effects, and all that is used: what is not pins nothing.

    By `id`, because literals have no hash.
    """
    used = {id(atom) for atom in jaxpr.outvars}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(var) in used for var in eqn.outvars):
            live.append(eqn)
            used.update(id(atom) for atom, is_used in zip(eqn.invars, _used_operands(eqn), strict=True) if is_used)
    return live[::-1], used


def _used_operands(eqn: Any) -> list[bool]:
    """Which operands a call or a branch uses; others use all."""
    called = _called(eqn)
    jaxprs = [called[0]] if called is not None else [_opened(b)[0] for b in eqn.params.get("branches", ())]
    if not jaxprs:
        return [True] * len(eqn.invars)
    found = [(jaxpr, live_equations(jaxpr)[1]) for jaxpr in jaxprs]
    flags = [any(id(jaxpr.invars[i]) in used for jaxpr, used in found) for i in range(len(jaxprs[0].invars))]
    return [True] * (len(eqn.invars) - len(flags)) + flags


# Primitives that do nothing but call a jaxpr with their operands.
_CALL_NAMES = (
    "jit pjit closed_call core_call core_closed_call call remat remat2 checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr"
)
_CALLS = frozenset(_CALL_NAMES.split())


def _called(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr of a call and its constants."""
    if eqn.primitive.name not in _CALLS:
        return None
    return _opened(next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params))


def _plain_params(params: Any) -> dict[str, Any]:
    return {name: _plain(value) for name, value in params.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.integer):
        return int(value)
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    return value


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants; newer versions of JAX have no separate class for closed ones."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _scan_counts(params: Any) -> tuple[int, int]:
    """How many operands of a scan are constant and carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constant, carried, _ = params["ft_in"].unpack()
    return len(constant), len(carried)


def _number(eqn: Any, operands: Sequence[Value]) -> Any:
    """The constant that an equation makes of constants: one that is the same everywhere, or a small index vector."""
    name, numbers = eqn.primitive.name, [value.number for value in operands]
    shape = eqn.outvars[0].aval.shape
    if any(number is None for number in numbers):
        return None
    if name == "concatenate" and math.prod(shape) <= _MOST_INDICES:
        shapes = [v.aval.shape for v in eqn.invars]
        parts = [np.broadcast_to(number, n) for number, n in zip(numbers, shapes, strict=True)]
        return np.concatenate(parts, eqn.params["dimension"])
    if name in ("broadcast_in_dim", "reshape", "squeeze", "transpose"):
        if np.ndim(numbers[0]) == 0:
            return numbers[0]
        return np.reshape(numbers[0], shape) if name in ("reshape", "squeeze") else None
    if name in rules.ELEMENTWISE:
        return scalars.evaluate(eqn, numbers)
    return None


def _constant(value: Any) -> Value:
    """A constant: along axes where it does not vary, nothing it does depends on the place."""
    shape = np.shape(value)
    try:
        array = np.asarray(value)
    except TypeError:  # random keys
        return Value(rules.pinned(shape, "constant"))
    words = []
    for axis, n in enumerate(shape):
        first = array.take([0], axis) if n else array
        same = n <= 1 or bool(np.all((array == first) | ((array != array) & (first != first))))
        words.append(uniform(n) if same else letter(n, "constant"))
    known = array.ndim == 0 or (array.size <= _MOST_INDICES and np.issubdtype(array.dtype, np.integer))
    return Value(tuple(words), number=array if known else None)


def _at(flow: Flow, i: int) -> Flow:
    """What is at place i of the first axis."""
    if isinstance(flow, Weights):
        parts = [sliced(window, 0, i, i + 1) for window in flow.windows]
        return Weights(tuple(squeezed(part, (0,)) for part in parts if part is not None))
    if isinstance(flow, Acts):
        return flow._replace(labels=tuple(ids[0] for ids in flow.labels if ids.shape[0] == 1))
    return None


def _with_axis(flow: Flow) -> Flow:
    if isinstance(flow, Weights):
        return Weights()
    if isinstance(flow, Acts):
        return Acts(tuple(ids[None] for ids in flow.labels))
    return None
