"""Verified symmetry: whether a function stays the same when its neurons are put in other orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from ngjax.spec import NeuralGraphSpec, flatten_with_path, format_path, repeated_params
from ngjax.symmetry import Permutations, permute_params, random_permutations


class SymmetryReport(NamedTuple):
    """What `check_symmetry` found.

    Attributes:
      deviation: largest change of an output under random permutations of all free ids, in units of that output's
        largest value: rounding (about 1e-6 in float32) where the spec is right.
      output: path of the output that changed the most.
      worst_id, worst_leaf: where the deviation is above the tolerance, the free id that alone changes the outputs the
        most, and of the parameters that it moves the one without which they change the least. Else empty.
      unused: parameters on which no output depends: whether their permutation is right cannot be seen.
      looks_free: pinned ids whose axes can be shuffled without a change. A number is no proof: it may be the inputs.
    """

    deviation: float
    output: str
    worst_id: str = ""
    worst_leaf: str = ""
    unused: tuple[str, ...] = ()
    looks_free: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"largest deviation {self.deviation:.1e} (output {self.output})"]
        if self.worst_id:
            lines.append(f"not symmetric: id {self.worst_id}, parameter {self.worst_leaf}")
        if self.unused:
            lines.append(f"no output depends on {', '.join(self.unused)}")
        if self.looks_free:
            lines.append(f"pinned, but looks free: {', '.join(self.looks_free)}")
        return "\n".join(lines)


def check_symmetry(
    apply_fn: Callable[..., Any],
    params: Any,
    spec: NeuralGraphSpec,
    *inputs: Any,
    key: PRNGKeyArray,
    tolerance: float = 1e-5,
    **kwargs: Any,
) -> SymmetryReport:
    """Runs a network with its neurons in other orders, and compares.

    Every floating leaf is perturbed first: the zeros and ones of a fresh initialization hide errors. Outputs whose path
    and shape repeat a leaf of `params` have to move as that leaf does, others have to stay. The network is run about
    once for each parameter and pinned id.

    Args:
      apply_fn: `apply_fn(params, *inputs, **kwargs)`, as for `trace_spec`.
      params: concrete parameters; leaves that are no arrays are static.
      spec: what is to be checked.
      inputs: concrete. They stay as they are, a state among them too.
      key: for perturbations and permutations.
      tolerance: deviation above which a culprit is looked for, and below which a pinned id looks free. Half precision
        and deep networks need more.
      kwargs: static arguments of the function.

    Raises:
      ValueError: the leaves are not those of the spec; no output, or one that is not finite.
    """
    pairs, treedef = flatten_with_path(params)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for _, leaf in pairs]
    arrays = jax.tree.unflatten(treedef, [x if array else None for (_, x), array in zip(pairs, is_array, strict=True)])
    # Drawn by numpy, which need not compile a function for each shape.
    permuting, drawing = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.bits(drawing, (4,))))
    leaves = [
        _perturbed(rng, leaf) if param.is_floating else leaf
        for param, leaf in zip(spec.params, spec.flatten(arrays), strict=True)
    ]

    @jax.jit
    def run(leaves: Sequence[Any], inputs: Any) -> Any:
        left = iter(jax.tree.leaves(spec.unflatten(leaves, like=arrays)))
        whole = [next(left) if array else x for (_, x), array in zip(pairs, is_array, strict=True)]
        return apply_fn(jax.tree.unflatten(treedef, whole), *inputs, **kwargs)

    results = run(leaves, inputs)
    paths, before = _outputs(results)
    for path, value in zip(paths, before, strict=True):
        if not np.all(np.isfinite(value)):
            raise ValueError(f"output {path} of the perturbed network is not finite; try inputs nearer to zero")
    repeated = _repeated(spec, results)

    def permuted(perms: Permutations, leaves: Sequence[Any]) -> list[Any]:
        return spec.flatten(permute_params(spec, perms, spec.unflatten(leaves, like=arrays)))

    def change(new: Sequence[Any], perms: Permutations) -> tuple[float, str]:
        """The largest difference from the outputs permuted, and where."""
        expected = list(before)
        if repeated and perms:
            moved = permuted(perms, [before[repeated[i]] if i in repeated else leaf for i, leaf in enumerate(leaves)])
            for number, place in repeated.items():
                expected[place] = np.asarray(moved[number], np.float64)
        after = _outputs(run(new, inputs))[1]
        return max(zip(map(_difference, expected, after), paths, strict=True))

    def without(number: int, perms: Permutations) -> tuple[float, str]:
        new = permuted(perms, leaves)
        return change([*new[:number], leaves[number], *new[number + 1 :]], perms)

    # Cycles leave no neuron where it was, as a random permutation of few may.
    perms = _cycles(rng, spec)
    deviation, output = max(
        change(permuted(drawn, leaves), drawn) for drawn in (perms, random_permutations(permuting, spec))
    )
    report = SymmetryReport(deviation, output)
    if deviation > tolerance:
        by_id = {id: change(permuted({id: perm}, leaves), {id: perm})[0] for id, perm in perms.items()}
        worst = max(by_id, key=lambda id: by_id[id])
        only = {worst: perms[worst]}
        moved = [
            i
            for i, (a, b) in enumerate(zip(leaves, permuted(only, leaves), strict=True))
            if spec.params[i].is_floating and not np.array_equal(a, b)
        ]
        blamed = min(moved, key=lambda i: without(i, only)[0])
        report = report._replace(worst_id=worst, worst_leaf=format_path(spec.params[blamed].path))

    unused = []
    for i, param in enumerate(spec.params):
        if param.is_floating:
            new = [*leaves[:i], _perturbed(rng, leaves[i]), *leaves[i + 1 :]]
            if all(map(np.array_equal, before, _outputs(run(new, inputs))[1])):
                unused.append(format_path(param.path))
    looks_free = []
    for id in dict.fromkeys(id for param in spec.params for id in param.axes):
        carriers = [param for param in spec.params if id in param.axes]
        if spec.is_free(id) or spec.action[id].size == 1 or {format_path(p.path) for p in carriers} & set(unused):
            continue
        cycle = _cycle(rng, spec.action[id].size)
        new = [_taken(leaf, cycle, param.axes, id) for param, leaf in zip(spec.params, leaves, strict=True)]
        if change(new, {})[0] < tolerance:
            looks_free.append(id)
    return report._replace(unused=tuple(unused), looks_free=tuple(looks_free))


def _perturbed(rng: np.random.Generator, leaf: Any) -> np.ndarray:
    """The leaf with half of its scale added at random; what is not negative (a variance) stays so."""
    values = np.asarray(leaf).astype(np.float64)
    scale = 0.5 * np.sqrt(np.mean(values**2)) if values.any() else 0.1
    noise = rng.uniform(-1.0 if np.any(values < 0) else 0.0, 1.0, values.shape)
    return np.asarray(values + scale * noise).astype(leaf.dtype)


def _outputs(results: Any) -> tuple[list[str], list[np.ndarray]]:
    pairs = flatten_with_path(results)[0]
    if not pairs:
        raise ValueError("expected a function with outputs, received one without any")
    return [format_path(path) for path, _ in pairs], [np.asarray(value).astype(np.float64) for _, value in pairs]


def _repeated(spec: NeuralGraphSpec, results: Any) -> dict[int, int]:
    """From the number of a parameter to the place among the outputs that repeats it."""
    found = repeated_params(spec.params, [(path, np.shape(x)) for path, x in flatten_with_path(results)[0]])
    return {number: place for place, number in enumerate(found) if number is not None}


def _difference(expected: np.ndarray, received: np.ndarray) -> float:
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    change = np.max(np.abs(expected - received), initial=0.0) / scale
    return math.inf if np.isnan(change) else float(change)


def _cycles(rng: np.random.Generator, spec: NeuralGraphSpec) -> dict[str, np.ndarray]:
    """For every independent permutation, at each place that it depends on, a cycle through all neurons."""
    cycles = {}
    for action in spec.actions:
        if action.kind == "permutation":
            lead = tuple(spec.action[id].size for id in action.per)
            rows = [_cycle(rng, action.size) for _ in range(math.prod(lead))]
            cycles[action.id] = np.stack(rows).reshape(*lead, action.size)
    return cycles


def _cycle(rng: np.random.Generator, size: int) -> np.ndarray:
    order = rng.permutation(size).astype(np.int32)
    cycle = np.empty_like(order)
    cycle[order] = np.roll(order, 1)
    return cycle


def _taken(leaf: Any, order: np.ndarray, ids: Sequence[str], id: str) -> Any:
    """The leaf with its places in another order along the axes of one id."""
    for axis, other in enumerate(ids):
        if other == id:
            leaf = np.take(leaf, order, axis)
    return leaf
